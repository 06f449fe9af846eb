package app

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/cgroup"
	"github.com/ambit-mesh/ambit/ebpf/handoff"
)

// maxProxyProcesses bounds the look at a proxy's cgroup; a proxy is one process.
const maxProxyProcesses = 1024

// admit makes the cgroup of a proxy that connects the proxy's to the programs. It
// must be the proxy's own: whatever runs in it, now or later, is believed to be
// the proxy and captured no more.
func (r *redirector) admit(p *handoff.Caller, podOf func(inode uint64) (string, bool), rewrite func() error) error {
	if r.kind == kindNFTables {
		if err := r.admitToRules(p, podOf, rewrite); err != nil {
			return err
		}
	}
	if r.hooks == nil {
		return nil
	}
	err := r.learn(p, podOf)
	if err != nil && r.kind != kindEBPF {
		// Only pods that have yet to change over depend on it.
		r.log.Warn("pods that eBPF programs still capture do not reach the proxy", "err", err)
		return nil
	}
	return err
}

func (r *redirector) learn(p *handoff.Caller, podOf func(inode uint64) (string, bool)) error {
	dir, err := cgroup.OfProcess(p.PID, r.cfg.CgroupRoot)
	if err != nil {
		return fmt.Errorf("learn the proxy's cgroup: %w", err)
	}
	if err := errors.Join(r.alone(p, dir, podOf), p.Alive()); err != nil {
		return err
	}
	return r.hooks.Proxy(dir)
}

// admitToRules has nftables rules know the proxy by its cgroup. Where that cannot be
// found its mark has to do: the status names that among the limits.
func (r *redirector) admitToRules(p *handoff.Caller, podOf func(inode uint64) (string, bool), rewrite func() error) error {
	near := r.cfg.CgroupRoot
	if near == "" {
		mount, err := cgroup.Mount()
		if err != nil {
			r.log.Warn("rules know the proxy by its mark only", "err", err)
			return nil
		}
		near = mount
	}
	dir, err := cgroup.OfProcess(p.PID, near)
	if err == nil {
		err = errors.Join(r.alone(p, dir, podOf), p.Alive())
	}
	if err != nil {
		r.log.Warn("rules know the proxy by its mark only", "err", err)
		return nil
	}
	changed, err := r.table.Proxy(dir)
	if err != nil || !changed {
		return err
	}
	// A proxy that rules do not know would capture itself.
	if err := rewrite(); err != nil {
		return err
	}
	r.log.Info("rules know the proxy by its cgroup", "cgroup", dir)
	return nil
}

// alone returns an error if others than the proxy are in its cgroup.
func (r *redirector) alone(p *handoff.Caller, dir string, podOf func(inode uint64) (string, bool)) error {
	if r.cfg.CgroupRoot != "" && cgroup.Within(r.cfg.CgroupRoot, dir) {
		return fmt.Errorf("the proxy (process %d) is in cgroup %s, which holds the pods' cgroup root %s: run it in a cgroup of its own", p.PID, dir, r.cfg.CgroupRoot)
	}
	// Whatever comes to be below it would be the proxy as well: at the hierarchy's
	// root, everybody.
	below, err := cgroup.Below(dir)
	if err != nil {
		return err
	}
	if below != "" {
		return fmt.Errorf("the proxy (process %d) is in cgroup %s, which holds others (%s): run it in a cgroup of its own", p.PID, dir, below)
	}
	ids, err := cgroup.Processes(dir, maxProxyProcesses)
	if err != nil {
		return fmt.Errorf("see who else is in the proxy's cgroup: %w", err)
	}
	home, err := netOf(p.PID)
	if err != nil {
		return fmt.Errorf("see where the proxy is: %w", err)
	}
	for _, id := range ids {
		ns, err := netOf(id)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // ended meanwhile
		} else if err != nil {
			return fmt.Errorf("see who else is in the proxy's cgroup %s: %w", dir, err)
		}
		if pod, ok := podOf(ns); ok && !(id == p.PID && visits(id, ns)) {
			return fmt.Errorf("the proxy (process %d) is in cgroup %s together with process %d of pod %s, which would be believed to be the proxy: run it in a cgroup of its own", p.PID, dir, id, pod)
		}
		// A pod may be enrolled later than the proxy came.
		if id != p.PID && ns != home && ns != r.home {
			return fmt.Errorf("the proxy (process %d) is in cgroup %s together with process %d of another network namespace, which would be believed to be the proxy: run it in a cgroup of its own", p.PID, dir, id)
		}
	}
	return nil
}

// netOf is the number of a process's network namespace.
func netOf(pid int) (uint64, error) {
	var st unix.Stat_t
	path := "/proc/" + strconv.Itoa(pid) + "/ns/net"
	if err := unix.Stat(path, &st); err != nil {
		err = &os.PathError{Op: "stat", Path: path, Err: err}
		if errors.Is(err, fs.ErrPermission) {
			return 0, fmt.Errorf("%w (takes CAP_SYS_PTRACE)", err)
		}
		return 0, err
	}
	return st.Ino, nil
}

// visits reports whether a process is in a namespace with some of its threads
// only, as the proxy is when it makes a socket there.
func visits(pid int, ns uint64) bool {
	tasks, err := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/task")
	if err != nil {
		return false
	}
	for _, t := range tasks {
		var st unix.Stat_t
		if unix.Stat("/proc/"+strconv.Itoa(pid)+"/task/"+t.Name()+"/ns/net", &st) == nil && st.Ino != ns {
			return true
		}
	}
	return false
}
