package redirect

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/cgroup"
	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// UnseenError refuses a pod whose connections pass no socket of its namespace, or
// none that the redirector knows: it would be called captured and speak in clear
// text, or be cut off. There is no other redirector for it: where programs see no
// sockets, rules see no packets, which go from link to link below them.
//
// Only a pod that is not captured yet is refused. One that is stays so, whatever
// appears in it: its gates let nothing else out.
type UnseenError struct{ Reason string }

func (e *UnseenError) Error() string {
	return "the pod cannot be captured: " + e.Reason + "; take it out of the mesh (label istio.io/dataplane-mode=none), or run it with the node's ordinary container runtime"
}

// seen looks for what sandboxed runtimes leave in a namespace.
//
//	Kata, KubeVirt  a tap device or a macvtap beside the pod's link: the app is in a virtual machine
//	gVisor          takes the addresses off the pod's links, to use them in a stack of its own
func seen(links []netlink.Link, addressed bool) error {
	for _, l := range links {
		kind := l.Type()
		if t, ok := l.(*netlink.Tuntap); ok && t.Mode == netlink.TUNTAP_MODE_TAP {
			kind = "tap"
		}
		switch kind {
		case "tap", "macvtap", "ipvtap":
			return &UnseenError{fmt.Sprintf("its link %s (%s) belongs to a virtual machine, whose connections are no sockets of the pod's (Kata Containers, KubeVirt)", l.Attrs().Name, kind)}
		}
	}
	if !addressed && slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Attrs().Flags&net.FlagUp != 0 }) {
		return &UnseenError{"its network namespace has a link that is up and no address: a runtime with a network stack of its own has taken them (gVisor), or the network plugin has not finished"}
	}
	return nil
}

// usable leaves links out that cannot send: some kernels give every namespace
// tunnel devices of their own, and down they are nobody's way.
func usable(links []netlink.Link) (out []netlink.Link) {
	for _, l := range links {
		if a := l.Attrs(); a.EncapType == "ether" || a.Flags&net.FlagLoopback != 0 || a.Flags&net.FlagUp != 0 {
			out = append(out, l)
		}
	}
	return out
}

// maxProcesses bounds the look at a node's processes.
const maxProcesses = 1 << 16

// reached returns an error if processes are in ns and no hook is above any of them.
// Some may be elsewhere (somebody looks into the pod with a node's tool): their
// connections meet the gate. Processes out of sight tell nothing.
func reached(ns *netns.NS, root string) error {
	outside := ""
	pids, err := processesIn(ns)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		dir, err := cgroup.OfProcess(pid, root)
		if errors.Is(err, cgroup.ErrOutside) {
			continue
		}
		if err != nil {
			continue // gone meanwhile
		}
		if cgroup.Within(dir, root) {
			return nil
		}
		outside = fmt.Sprintf("process %d (%s) of cgroup %s", pid, comm(pid), dir)
	}
	if outside == "" {
		return nil
	}
	return &UnseenError{fmt.Sprintf("its processes are not below the pods' cgroup root %s (--cgroup-root), as %s is not", root, outside)}
}

func processesIn(ns *netns.NS) ([]int, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	defer proc.Close()
	names, err := proc.Readdirnames(maxProcesses)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat("/proc/"+name+"/ns/net", &st); err == nil && st.Ino == ns.Inode() {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func comm(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
	if err != nil {
		return "gone"
	}
	return strings.TrimSpace(string(b))
}

// refuse returns why a pod cannot be captured by rules.
func (d *Dataplane) refuse(ns *netns.NS) error {
	if present, err := tablePresent(ns, tableName); err != nil || present {
		return err
	}
	p, err := inspect(ns)
	if err != nil {
		return err
	}
	return seen(p.links, p.v4.IsValid() || p.v6.IsValid())
}

// refuse returns why a pod cannot be captured by programs.
func (h *Hooks) refuse(p *pod) error {
	if present, err := h.Present(p.ns); err != nil || present {
		return err
	}
	if err := seen(p.links, p.v4.IsValid() || p.v6.IsValid()); err != nil {
		return err
	}
	return reached(p.ns, h.cfg.CgroupRoot)
}
