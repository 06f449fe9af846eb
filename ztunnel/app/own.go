package app

import (
	"context"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/ztunnel/inpod"
)

// The proxy's own pod has an HBONE port too, so that a client in the mesh that
// scrapes its metrics does so under mutual TLS and policy. Nothing else is
// reached by it: on a host network the other ports are the node's.

// ownUID names the proxy's own pod where pods are named by uid.
const ownUID = "ztunnel"

// hasOwn reports whether the proxy knows which pod it is.
func (c *Config) hasOwn() bool {
	return c.Mode != dedicated && c.EnableProxy && c.PodName != "" && c.PodNamespace != "" && c.ServiceAccount != ""
}

func (a *app) newOwn() *inpod.Manager {
	return inpod.New(inpod.Config{
		Serve: func(p handoff.Pod) (inpod.Handlers, error) {
			h := a.node.serve(p, podNet{originalDst: originalDst, only: a.statsPort})
			h.Outbound, h.Plaintext, h.SOCKS, h.DNSPacket, h.DNSStream = nil, nil, nil, nil, nil
			return h, nil
		},
		DrainTimeout: a.cfg.TerminationDeadline, Mark: int(a.cfg.PacketMark), IPv6: a.cfg.IPv6Enabled, NoPortReuse: !a.cfg.InpodPortReuse,
		Liveness: a.cfg.liveness(), Changed: a.node.changed.signal, Logger: boot.Scoped(a.log, "inpod"),
	})
}

// serveOwn opens the port once the mesh is known. Without it the metrics are
// scraped in clear text as ever, so a port that is taken ends nothing.
func (a *app) serveOwn(ctx, group context.Context) error {
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
		if a.own.AddPod(ctx, handoff.Pod{UID: ownUID, Name: a.cfg.PodName, Namespace: a.cfg.PodNamespace, ServiceAccount: a.cfg.ServiceAccount, NS: ns}) == nil {
			return nil
		}
		_ = ns.Close() // the manager has logged why
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

// allPods are all whose identities are needed.
func (a *app) allPods() []handoff.Pod { return append(a.pods.Pods(), a.own.Pods()...) }
