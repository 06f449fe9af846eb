package app

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/ambit-mesh/ambit/test/lab/sandbox"
)

// programs shows which of the kernel's hooks run programs of a node's agent, by
// what is pinned on the node's BPF file system, as the kernel tells it.
func (c *call) programs(context.Context) (int, error) {
	if len(c.Args) != 1 {
		return 2, errors.New("programs wants the name of a node")
	}
	node := c.Args[0]
	if _, ok := c.app.net.Node(node); !ok {
		return 1, fmt.Errorf("there is no node %q", node)
	}
	found := map[string][]string{} // where → hooks
	root := filepath.Join(bpfDir, node)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // unpinned meanwhile, or no BPF file system
		}
		if err != nil || d.IsDir() {
			return err
		}
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return nil // a map
		}
		defer l.Close()
		info, err := l.Info()
		if err != nil {
			return nil // gone
		}
		where, hook := c.app.attached(path, info)
		found[where] = append(found[where], hook)
		return nil
	})
	if err != nil {
		return 1, err
	}
	if len(found) == 0 {
		c.w.Printf("the kernel runs no program of %s\n", node)
		return 0, nil
	}
	t := tabwriter.NewWriter(c.w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "WHERE\tHOOKS")
	for _, where := range slices.Sorted(maps.Keys(found)) {
		slices.Sort(found[where])
		fmt.Fprintf(t, "%s\t%s\n", where, strings.Join(found[where], " "))
	}
	return 0, t.Flush()
}

// attached says in words where a pinned link is.
func (a *App) attached(path string, info *link.Info) (where, hook string) {
	if c := info.Cgroup(); c != nil {
		return "cgroup " + cgroupOf(c.CgroupId), hookName(ebpf.AttachType(c.AttachType))
	}
	// Links of one pod are together; the one in its namespace tells which.
	pod := "a pod that is gone"
	if l, err := link.LoadPinnedLink(filepath.Join(filepath.Dir(path), "lookup"), nil); err == nil {
		if i, err := l.Info(); err == nil && i.NetNs() != nil {
			pod = a.podOf(uint64(i.NetNs().NetnsInode))
		}
		_ = l.Close() // a descriptor
	}
	switch {
	case info.NetNs() != nil:
		return "pod " + pod, hookName(ebpf.AttachType(info.NetNs().AttachType))
	case info.TCX() != nil && strings.HasPrefix(filepath.Base(path), "host-"):
		return "pod " + pod + ", the node's end of its cable", hookName(ebpf.AttachType(info.TCX().AttachType))
	case info.TCX() != nil:
		return "pod " + pod + ", its interface", hookName(ebpf.AttachType(info.TCX().AttachType))
	}
	return "elsewhere", filepath.Base(path)
}

// hookName is the kernel's name of a hook. The library has names of its own:
// CGroupInet4Connect is connect4, CGroupUDP6Sendmsg is sendmsg6.
func hookName(t ebpf.AttachType) string {
	switch t {
	case ebpf.AttachSkLookup:
		return "sk_lookup"
	case ebpf.AttachTCXIngress:
		return "tcx/ingress"
	case ebpf.AttachTCXEgress:
		return "tcx/egress"
	case ebpf.AttachCGroupSockOps:
		return "sock_ops"
	}
	s := strings.TrimPrefix(strings.ToLower(t.String()), "cgroup")
	for _, kind := range []string{"inet", "udp"} {
		if rest, ok := strings.CutPrefix(s, kind); ok && rest != "" {
			return rest[1:] + rest[:1]
		}
	}
	return s
}

// cgroupOf is the path below the lab's cgroup of the one with that number, which
// is its inode's (kernfs).
func cgroupOf(id uint64) string {
	lab, found := sandbox.Cgroup(), fmt.Sprint(id)
	_ = filepath.WalkDir(lab, func(path string, d fs.DirEntry, err error) error { // not found: the number says it
		if err != nil || !d.IsDir() {
			return nil
		}
		if st, err := os.Stat(path); err == nil && st.Sys().(*syscall.Stat_t).Ino == id {
			if found = strings.TrimPrefix(path, lab+"/"); path == lab {
				found = "of the whole lab"
			}
			return fs.SkipAll
		}
		return nil
	})
	return found
}

func (a *App) podOf(inode uint64) string {
	for _, h := range a.kubelet.Hosts() {
		if st, err := os.Stat(h.Path()); err == nil && st.Sys().(*syscall.Stat_t).Ino == inode {
			return strings.Replace(h.Name, ".", "/", 1)
		}
	}
	return fmt.Sprintf("with the namespace %d", inode)
}
