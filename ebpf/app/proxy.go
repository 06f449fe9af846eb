package app

import (
	"fmt"
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
func (r *redirector) admit(p handoff.Peer, podOf func(inode uint64) (string, bool)) error {
	if r.hooks == nil {
		return nil
	}
	dir, err := cgroup.OfProcess(p.PID, r.cfg.CgroupRoot)
	if err != nil {
		return fmt.Errorf("learn the proxy's cgroup: %w", err)
	}
	if err := r.alone(p, dir, podOf); err != nil {
		return err
	}
	return r.hooks.Proxy(dir)
}

// alone returns an error if others than the proxy are in its cgroup.
func (r *redirector) alone(p handoff.Peer, dir string, podOf func(inode uint64) (string, bool)) error {
	for _, above := range []struct{ dir, name string }{
		{r.cfg.CgroupRoot, "the pods' cgroup root"}, {r.cfg.NodeCgroup, "the node's cgroup"},
	} {
		if above.dir != "" && cgroup.Within(above.dir, dir) {
			return fmt.Errorf("the proxy (process %d) is in cgroup %s, which holds %s %s: run it in a cgroup of its own", p.PID, dir, above.name, above.dir)
		}
	}
	ids, err := cgroup.Processes(dir, maxProxyProcesses)
	if err != nil {
		return fmt.Errorf("see who else is in the proxy's cgroup: %w", err)
	}
	for _, id := range ids {
		// The link itself tells the number; following it would be entering.
		var st unix.Stat_t
		path := "/proc/" + strconv.Itoa(id) + "/ns/net"
		if err := unix.Stat(path, &st); err == unix.ENOENT || err == unix.ESRCH {
			continue // ended meanwhile
		} else if err != nil {
			return fmt.Errorf("see who else is in the proxy's cgroup %s (takes CAP_SYS_PTRACE): %w", dir, &os.PathError{Op: "stat", Path: path, Err: err})
		}
		if pod, ok := podOf(st.Ino); ok {
			return fmt.Errorf("the proxy (process %d) is in cgroup %s together with process %d of pod %s, which would be believed to be the proxy: run it in a cgroup of its own", p.PID, dir, id, pod)
		}
	}
	return nil
}
