package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// A dedicated proxy serves one workload of which it is part: on a virtual
// machine, a plain host, or as one of a pod's containers. There is no agent; the
// ports are opened in the process's own network namespace once the mesh is
// known, and certificates are asked for with the workload's own token.

// dedicatedUID names the one workload where pods are named by uid.
const dedicatedUID = "dedicated"

// serveOne serves the workload until the signal, before the drain.
func (a *app) serveOne(ctx, group context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(group, cancel)()
	select {
	case <-a.syncedc:
	case <-ctx.Done():
		return nil
	}
	for wait := time.Second; ; wait = min(2*wait, maxPortWait) {
		ns, err := netns.Own()
		if err != nil {
			return err
		}
		w := a.cfg.Workload
		err = a.pods.AddPod(ctx, handoff.Pod{UID: dedicatedUID, Name: w.Name, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, NS: ns})
		if err == nil {
			for _, task := range a.cfg.tasks()[1:] { // all but the mesh, which is known
				a.gate.open(task)
			}
			return nil
		}
		_ = ns.Close() // err says more
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			return fmt.Errorf("dedicated proxy: %w", err)
		}
		select { // a proxy before this one may still hold the ports
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

// maxPortWait bounds the time between attempts to open the ports (arbitrary).
const maxPortWait = 10 * time.Second

// only finds the workload of a dedicated proxy. It may be on any node or none,
// so no index leads to it; it is looked for again when the one found changed.
type only struct {
	ref   WorkloadRef
	found atomic.Pointer[onlyFound]
}

type onlyFound struct {
	in  *mesh.Snapshot
	uid string // "" if there was none
}

func (o *only) lookup(m *mesh.Snapshot) *mesh.Workload {
	if o.ref == (WorkloadRef{}) {
		return nil
	}
	last := o.found.Load()
	if last != nil {
		if w := m.Workload(last.uid); w != nil && o.is(w) {
			return w
		}
		if last.in == m {
			return nil
		}
	}
	now := &onlyFound{in: m}
	var best *mesh.Workload
	for w := range m.AllWorkloads() {
		if o.is(w) && (best == nil || w.UID < best.UID) {
			best, now.uid = w, w.UID
		}
	}
	o.found.Store(now)
	return best
}

func (o *only) is(w *mesh.Workload) bool {
	return w.Namespace == o.ref.Namespace && w.Name == o.ref.Name && w.ServiceAccount == o.ref.ServiceAccount
}

// degrade turns off what the process may not do, unless it was asked for:
// without redirection nothing needs the marks, and connections come by SOCKS5.
func (c *Config) degrade(log *slog.Logger, try func(sockopt.Options) error) error {
	if err := try(sockopt.Options{Mark: int(c.PacketMark)}); err != nil && c.PacketMark != 0 {
		log.Warn("sockets are not marked: redirection that goes by the mark would loop; give the process CAP_NET_ADMIN if this host redirects", "error", err.Error())
		c.PacketMark = 0
	}
	if !c.EnableOrigSrc {
		return nil
	}
	if err := try(sockopt.Options{Transparent: true}); err != nil {
		if c.OrigSrc == OrigSrcOn {
			return fmt.Errorf("ENABLE_ORIG_SRC=true: %w (it needs CAP_NET_ADMIN)", err)
		}
		log.Warn("applications see this proxy's address instead of their clients': it needs CAP_NET_ADMIN to show these", "error", err.Error())
		c.EnableOrigSrc = false
	}
	if !c.SOCKS5 {
		log.Warn("without redirection nothing leads connections here: set UNSTABLE_ENABLE_SOCKS5=true and point clients to 127.0.0.1:15080")
	}
	return nil
}

// probe reports whether the process may set options on a socket.
func probe(o sockopt.Options) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(fd)
	return sockopt.Apply(fd, false, o)
}
