package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/bpf"
)

// Below HooksConfig.Dir:
//
//	maps/NAME               the maps, of one layout
//	maps-next/NAME          their successors, while programs are being moved over
//	root/PROGRAM            links at the pods' cgroup root
//	lease/PROGRAM           links at the pods' cgroup root, of acceleration
//	proxy/CGROUP/PROGRAM    links at a proxy's cgroup, by its number
//	pods/COOKIE/{lookup,gate-INDEX,host-INDEX,probe-INDEX}   links of one pod, by the index of its interface
//
// That file system takes no name with a dot in it (EPERM).
const (
	mapsDir  = "maps"
	nextDir  = "maps-next"
	rootDir  = "root"
	leaseDir = "lease"
	proxyDir = "proxy"
	podsDir  = "pods"
)

func (h *Hooks) path(elem ...string) string {
	return filepath.Join(append([]string{h.cfg.Dir}, elem...)...)
}

// attachment is a program and its hook.
type attachment struct {
	program string
	attach  ebpf.AttachType
}

// rootHooks end with connect, which makes the aliases that the others translate:
// programs come into force one after the other.
var rootHooks = []attachment{
	{bpf.CgroupProgPodGetpeername4, ebpf.AttachCgroupInet4GetPeername},
	{bpf.CgroupProgPodGetpeername6, ebpf.AttachCgroupInet6GetPeername},
	{bpf.CgroupProgPodGetsockname4, ebpf.AttachCgroupInet4GetSockname},
	{bpf.CgroupProgPodGetsockname6, ebpf.AttachCgroupInet6GetSockname},
	{bpf.CgroupProgPodRecvmsg4, ebpf.AttachCGroupUDP4Recvmsg},
	{bpf.CgroupProgPodRecvmsg6, ebpf.AttachCGroupUDP6Recvmsg},
	{bpf.CgroupProgPodSendmsg4, ebpf.AttachCGroupUDP4Sendmsg},
	{bpf.CgroupProgPodSendmsg6, ebpf.AttachCGroupUDP6Sendmsg},
	{bpf.CgroupProgPodBind4, ebpf.AttachCGroupInet4Bind},
	{bpf.CgroupProgPodBind6, ebpf.AttachCGroupInet6Bind},
	{bpf.CgroupProgPodConnect4, ebpf.AttachCGroupInet4Connect},
	{bpf.CgroupProgPodConnect6, ebpf.AttachCGroupInet6Connect},
}

// leaseHooks are at the pods' root while a pod is accelerated: the kernel calls
// sockops programs several times in the life of every connection.
var leaseHooks = []attachment{
	{bpf.CgroupProgLeaseSockops, ebpf.AttachCGroupSockOps},
	{bpf.CgroupProgLeaseGetpeername4, ebpf.AttachCgroupInet4GetPeername},
	{bpf.CgroupProgLeaseGetpeername6, ebpf.AttachCgroupInet6GetPeername},
}

var proxyHooks = []attachment{
	{bpf.CgroupProgProxySockops, ebpf.AttachCGroupSockOps},
	{bpf.CgroupProgProxyGetsockopt, ebpf.AttachCGroupGetsockopt},
	{bpf.CgroupProgProxySendmsg4, ebpf.AttachCGroupUDP4Sendmsg},
	{bpf.CgroupProgProxySendmsg6, ebpf.AttachCGroupUDP6Sendmsg},
	{bpf.CgroupProgProxyBind4, ebpf.AttachCGroupInet4Bind},
	{bpf.CgroupProgProxyBind6, ebpf.AttachCGroupInet6Bind},
	{bpf.CgroupProgProxyConnect4, ebpf.AttachCGroupInet4Connect},
	{bpf.CgroupProgProxyConnect6, ebpf.AttachCGroupInet6Connect},
}

// openMaps takes the pinned maps over, or makes new ones. A first start needs
// nobody to wait: nothing is enrolled. Anything else that is not the one known
// layout is a rebuild, on hold.
func (h *Hooks) openMaps(specs map[string]*ebpf.MapSpec) error {
	known, empty := h.pinnedMaps(specs)
	if known {
		return nil
	}
	for name, spec := range specs {
		if name == ".rodata" {
			continue
		}
		m, err := ebpf.NewMap(spec)
		if err != nil {
			return fmt.Errorf("create map %s: %w", name, explainLoad(err))
		}
		h.maps[name] = m
	}
	h.rebuilt = !empty
	if err := errors.Join(h.putSettings(h.rebuilt), h.hold()); err != nil {
		return err
	}
	// Links move to the new maps before the new maps are the known ones: who
	// dies between leaves maps-next, and the next start begins again.
	if err := os.RemoveAll(h.path(nextDir)); err != nil {
		return err
	}
	if err := os.MkdirAll(h.path(nextDir), 0o700); err != nil {
		return err
	}
	for name, m := range h.maps {
		if err := m.Pin(h.path(nextDir, name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	return h.cfg.step("maps")
}

// pinnedMaps opens the maps into h.maps if all are there and of this layout, with
// nothing half done; empty means that nothing was ever pinned.
func (h *Hooks) pinnedMaps(specs map[string]*ebpf.MapSpec) (known, empty bool) {
	if _, err := os.Stat(h.path(nextDir)); !errors.Is(err, fs.ErrNotExist) {
		return false, false
	}
	if _, err := os.Stat(h.path(mapsDir)); errors.Is(err, fs.ErrNotExist) {
		_, err := os.Stat(h.path(rootDir))
		return false, errors.Is(err, fs.ErrNotExist)
	}
	found := map[string]*ebpf.Map{}
	for name, spec := range specs {
		if name == ".rodata" {
			continue
		}
		m, err := ebpf.LoadPinnedMap(h.path(mapsDir, name), nil)
		if err == nil {
			found[name] = m
			err = spec.Compatible(m)
		}
		if err != nil {
			h.cfg.Logger.Warn("pinned eBPF state is not of this program's layout and will be rebuilt", "map", name, "error", err.Error())
			closeMaps(found)
			return false, false
		}
	}
	var s bpf.CgroupSettings
	if err := found[bpf.CgroupMapMeshSettings].Lookup(uint32(0), &s); err != nil || s.Layout != h.cfg.version.layout {
		h.cfg.Logger.Warn("pinned eBPF state is not of this program's layout and will be rebuilt", "layout", s.Layout, "want", h.cfg.version.layout)
		closeMaps(found)
		return false, false
	}
	h.maps = found
	// Who died on hold left it to us.
	h.rebuilt = s.Hold != 0
	if err := h.putSettings(h.rebuilt); err != nil {
		return false, false
	}
	return true, false
}

func closeMaps(maps map[string]*ebpf.Map) {
	for _, m := range maps {
		_ = m.Close() // a descriptor
	}
}

// publishMaps makes maps-next the known ones.
func (h *Hooks) publishMaps() error {
	if _, err := os.Stat(h.path(nextDir)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := os.RemoveAll(h.path(mapsDir)); err != nil {
		return fmt.Errorf("unpin old maps: %w", err)
	}
	if err := h.cfg.step("old maps"); err != nil {
		return err
	}
	if err := os.Rename(h.path(nextDir), h.path(mapsDir)); err != nil {
		return fmt.Errorf("publish maps: %w", err)
	}
	return nil
}

// Proxy makes the processes of a cgroup2 directory the node proxy: its listeners
// get the pods' connections, and what it opens is not captured. The caller vouches
// for the directory. Call it before the proxy listens anywhere.
func (h *Hooks) Proxy(cgroup string) error {
	id, err := cgroupID(cgroup)
	if err != nil {
		return fmt.Errorf("find the proxy's cgroup %s: %w", cgroup, err)
	}
	if err := h.attachCgroup(cgroup, h.path(proxyDir, fmt.Sprint(id)), proxyHooks, h.proxy); err != nil {
		return fmt.Errorf("attach to the proxy's cgroup %s: %w", cgroup, err)
	}
	return nil
}

// moveProxies has the proxies that are known run this process's programs.
func (h *Hooks) moveProxies() error {
	dirs, err := os.ReadDir(h.path(proxyDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list proxies: %w", err)
	}
	for _, d := range dirs {
		for _, a := range proxyHooks {
			l, err := link.LoadPinnedLink(h.path(proxyDir, d.Name(), a.program), nil)
			if errors.Is(err, fs.ErrNotExist) {
				continue // Proxy attaches it
			}
			if err == nil {
				err = l.Update(h.proxy[a.program])
				_ = l.Close() // it is pinned
			}
			// A cgroup that is gone takes its links with it.
			if err != nil && !errors.Is(err, unix.ENOLINK) {
				return fmt.Errorf("update %s of proxy %s: %w", a.program, d.Name(), err)
			}
			if err := h.cfg.step("proxy " + a.program); err != nil {
				return err
			}
		}
	}
	return nil
}

// cgroupID is the number that the kernel knows a cgroup by (kernfs: its inode's).
func cgroupID(dir string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, err
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, errors.New("not a cgroup2 directory")
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}

func (h *Hooks) attachCgroup(cgroup, pins string, hooks []attachment, progs programs) error {
	id, err := cgroupID(cgroup)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(pins, 0o700); err != nil {
		return err
	}
	for _, a := range hooks {
		pin := filepath.Join(pins, a.program)
		err := place(pin, progs[a.program],
			func(i *link.Info) bool { c := i.Cgroup(); return c != nil && c.CgroupId == id },
			func() (link.Link, error) {
				return link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: a.attach, Program: progs[a.program]})
			})
		if err != nil {
			return fmt.Errorf("attach %s: %w", a.program, explainAttach(cgroup, a.attach, err))
		}
		if err := h.cfg.step(filepath.Base(pins) + " " + a.program); err != nil {
			return err
		}
	}
	return sweep(pins, func(name string) bool {
		return slices.ContainsFunc(hooks, func(a attachment) bool { return a.program == name })
	})
}

// sweep unpins what another version had in dir besides.
func sweep(dir string, ours func(name string) bool) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if ours(e.Name()) {
			continue
		}
		pin := filepath.Join(dir, e.Name())
		if l, err := link.LoadPinnedLink(pin, nil); err == nil {
			_ = l.Detach() // at once: without its pin the kernel does it some time later. Of an interface that is gone it is
			_ = l.Close()
		}
		if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("unpin %s of another version: %w", e.Name(), err)
		}
	}
	return nil
}

// place makes the pinned link at pin run p: an existing one that is still where it
// should be (here) is updated in place, so that no moment is without a program.
// Otherwise attach makes one, and only then the old one goes.
func place(pin string, p *ebpf.Program, here func(*link.Info) bool, attach func() (link.Link, error)) error {
	old, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		defer old.Close()
		info, err := old.Info()
		if err == nil && here(info) && old.Update(p) == nil {
			return nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open pinned link: %w", err)
	}
	fresh, err := attach()
	if err != nil {
		return explainLoad(err)
	}
	defer fresh.Close()
	if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := fresh.Pin(pin); err != nil {
		return fmt.Errorf("pin link: %w", err)
	}
	return nil
}

// Uninstall takes everything away: pods that are still enrolled connect as they
// would without a mesh.
func (h *Hooks) Uninstall() error {
	// What no pin holds (see clsact.go) passes everything from here on.
	if err := clearMap(h.path(mapsDir, bpf.CgroupMapMeshEnrolled)); err != nil {
		return fmt.Errorf("delete enrolments: %w", err)
	}
	// connect goes first: while it rewrites, the others are needed.
	for i := len(rootHooks) - 1; i >= 0; i-- {
		if err := os.Remove(h.path(rootDir, rootHooks[i].program)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("detach %s: %w", rootHooks[i].program, err)
		}
	}
	for _, dir := range []string{podsDir, leaseDir, proxyDir, rootDir, nextDir, mapsDir} {
		if err := os.RemoveAll(h.path(dir)); err != nil {
			return fmt.Errorf("unpin %s: %w", dir, err)
		}
	}
	return nil
}

// clearMap deletes all entries of a pinned hash map of any layout.
func clearMap(pin string) error {
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer m.Close()
	if m.Type() != ebpf.Hash {
		return nil // something else by that name
	}
	for {
		key, err := m.NextKeyBytes(nil)
		if key == nil || err != nil {
			return err
		}
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
}
