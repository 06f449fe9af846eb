package redirect

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/bpf"
	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// HooksConfig is common to all pods of a node.
type HooksConfig struct {
	CgroupRoot string       // cgroup2 directory above all pods
	Dir        string       // directory on a BPF file system, of this node alone
	Node       *netns.NS    // the node's own namespace, where the pods' cables end; the caller's. nil: no gates there, no probes
	Probes     bool         // connections that the node's own processes open to pods reach the app
	Logger     *slog.Logger // nil: none

	version version
}

// version is what a test changes to be another version of this program.
type version struct {
	layout uint32                                 // 0: bpf.Layout
	alter  func(cgroup, pod *ebpf.CollectionSpec) // nil: not at all
	step   func(what string) error                // called after each lasting step; its error ends the work as a crash would
	noTCX  bool                                   // as on a kernel without
}

func (c HooksConfig) step(what string) error {
	if c.version.step == nil {
		return nil
	}
	return c.version.step(what)
}

func (c HooksConfig) withDefaults() HooksConfig {
	c.version.layout = cmp.Or(c.version.layout, bpf.Layout)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c HooksConfig) validate() error {
	var errs []error
	var fs unix.Statfs_t
	if err := unix.Statfs(c.CgroupRoot, &fs); err != nil {
		errs = append(errs, fmt.Errorf("find cgroup root %q: %w", c.CgroupRoot, err))
	} else if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		errs = append(errs, fmt.Errorf("cgroup root %s is not a cgroup2 directory", c.CgroupRoot))
	}
	if err := unix.Statfs(c.Dir, &fs); err != nil {
		errs = append(errs, fmt.Errorf("find BPF directory %q: %w", c.Dir, err))
	} else if fs.Type != unix.BPF_FS_MAGIC {
		errs = append(errs, fmt.Errorf("%s is not on a BPF file system (mount -t bpf bpffs DIR)", c.Dir))
	}
	return errors.Join(errs...)
}

// Hooks steers connections with eBPF programs instead of rules, and does for the
// agent what a Dataplane does. Programs, maps and links are pinned below
// HooksConfig.Dir: they work on when the process ends, and the next OpenHooks
// takes them over and replaces the programs by its own, one atomic update each.
//
// Methods may run at the same time for different namespaces.
type Hooks struct {
	cfg     HooksConfig
	maps    map[string]*ebpf.Map
	pod     *ebpf.CollectionSpec // of the programs that every pod has its own of
	root    programs
	proxy   programs
	node    programs // at the node's end of cables
	lease   programs
	rebuilt bool
	noTCX   atomic.Bool // found out by the first gate

	mu      sync.Mutex
	current map[uint64]bool // pods, by cookie, whose programs are of this process
	blind   map[uint64]bool // pods whose cables' node ends are not known

	accelerated map[uint64]*netns.NS // pods, by cookie
	leases      *Leases              // nil: none are granted

	leaseHooks sync.Mutex // leaseHooks are attached, or not, as enrolments say
}

// programs are loaded ones by their name.
type programs map[string]*ebpf.Program

// OpenHooks loads the programs and attaches the pods' ones to the cgroup root.
//
// Pinned state of a layout that this program does not know is replaced, never
// read: see Rebuilt.
func OpenHooks(cfg HooksConfig) (*Hooks, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("configure eBPF redirection: %w", err)
	}
	h := &Hooks{cfg: cfg, maps: map[string]*ebpf.Map{}, current: map[uint64]bool{}, blind: map[uint64]bool{}, accelerated: map[uint64]*netns.NS{}}
	h.noTCX.Store(cfg.version.noTCX)
	if err := h.open(); err != nil {
		_ = h.Close() // err says more
		return nil, fmt.Errorf("open eBPF redirection: %w", err)
	}
	return h, nil
}

func (h *Hooks) open() error {
	node, err := bpf.LoadCgroup()
	if err != nil {
		return err
	}
	if h.pod, err = bpf.LoadPod(); err != nil {
		return err
	}
	if h.cfg.version.alter != nil {
		h.cfg.version.alter(node, h.pod)
	}
	if err := h.openMaps(node.Maps); err != nil {
		return err
	}
	if err := h.putRoot(); err != nil {
		return err
	}
	kernel := btf.NewCache() // megabytes, which nobody needs later
	tells, err := tellsInterface(kernel)
	if err != nil {
		return fmt.Errorf("read the kernel's types: %w", err)
	}
	if err := h.pod.Variables["lookup_tells_interface"].Set(tells); err != nil {
		return err
	}
	coll, err := ebpf.NewCollectionWithOptions(node, ebpf.CollectionOptions{MapReplacements: h.maps, Cache: kernel})
	if err != nil {
		return fmt.Errorf("load programs: %w", explainLoad(err))
	}
	defer coll.Close()
	h.root, h.proxy, h.node, h.lease = programs{}, programs{}, programs{}, programs{}
	h.node[bpf.CgroupProgNodeProbe] = coll.DetachProgram(bpf.CgroupProgNodeProbe)
	for _, a := range leaseHooks {
		h.lease[a.program] = coll.DetachProgram(a.program)
	}
	for _, a := range rootHooks {
		h.root[a.program] = coll.DetachProgram(a.program)
	}
	for _, a := range proxyHooks {
		h.proxy[a.program] = coll.DetachProgram(a.program)
	}
	if err := h.attachCgroup(h.cfg.CgroupRoot, h.path(rootDir), rootHooks, h.root); err != nil {
		return err
	}
	// What a connect began with the old programs is accepted by the old ones.
	if err := h.moveProxies(); err != nil {
		return err
	}
	if err := h.publishMaps(); err != nil {
		return err
	}
	return h.cfg.step("published")
}

// tellsInterface reports whether the kernel tells sk_lookup programs where a packet
// arrives (Linux 5.17).
func tellsInterface(kernel *btf.Cache) (bool, error) {
	types, err := kernel.Kernel()
	if err != nil {
		return false, err
	}
	found, err := types.AnyTypesByName("bpf_sk_lookup")
	if err != nil && !errors.Is(err, btf.ErrNotFound) {
		return false, err
	}
	for _, t := range found {
		s, ok := t.(*btf.Struct)
		if ok && slices.ContainsFunc(s.Members, func(m btf.Member) bool { return m.Name == "ingress_ifindex" }) {
			return true, nil
		}
	}
	return false, nil
}

func explainLoad(err error) error {
	if errors.Is(err, ebpf.ErrNotSupported) {
		return &UnsupportedError{Feature: "the programs' kind or helpers (Linux 5.15)", Err: err}
	}
	return err
}

// Rebuilt reports that pinned state of another layout was found and replaced.
// Until its Apply, or Ready, a pod that may have been enrolled cannot connect,
// because nobody knows how it was; and proxies have to listen again. Other pods
// notice nothing.
func (h *Hooks) Rebuilt() bool { return h.rebuilt }

// Ready says that Apply has been called for all enrolled pods: what else was
// pinned belonged to pods that left the mesh meanwhile.
func (h *Hooks) Ready() error {
	var (
		cookie uint64
		e      bpf.CgroupEnrolment
		held   []uint64
	)
	it := h.maps[bpf.CgroupMapMeshEnrolled].Iterate()
	for it.Next(&cookie, &e) {
		if e.Flags&bpf.CgroupEnrolmentFlagENROL_HOLD != 0 {
			held = append(held, cookie)
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("list enrolments: %w", err)
	}
	for _, c := range held {
		if err := h.forget(c); err != nil {
			return err
		}
	}
	return h.putSettings(false)
}

// hold enrols whoever has pins, in a way that lets nothing out or in: pins are
// named alike in all layouts.
func (h *Hooks) hold() error {
	dirs, err := os.ReadDir(h.path(podsDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list pods: %w", err)
	}
	for _, d := range dirs {
		c, err := strconv.ParseUint(d.Name(), 10, 64)
		if err != nil {
			continue
		}
		// Both directions: the pod's programs come to this map before its Apply has written more.
		held := bpf.CgroupEnrolment{Flags: bpf.CgroupEnrolmentFlagENROL_HOLD | bpf.CgroupEnrolmentFlagENROL_OUTBOUND | bpf.CgroupEnrolmentFlagENROL_INBOUND}
		if err := h.enrol(c, held); err != nil {
			return err
		}
	}
	return nil
}

func (h *Hooks) putSettings(hold bool) error {
	s := bpf.CgroupSettings{Layout: h.cfg.version.layout}
	if hold {
		s.Hold = 1
	}
	if err := h.maps[bpf.CgroupMapMeshSettings].Put(uint32(0), s); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	return nil
}

// putRoot tells the programs which processes are pods'.
func (h *Hooks) putRoot() error {
	root, err := os.Open(h.cfg.CgroupRoot)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := h.maps[bpf.CgroupMapMeshRoot].Put(uint32(0), uint32(root.Fd())); err != nil {
		return fmt.Errorf("write the pods' cgroup root: %w", err)
	}
	return nil
}

// Close lets go of descriptors. Nothing in the kernel changes.
func (h *Hooks) Close() error {
	var errs []error
	h.mu.Lock()
	for c, ns := range h.accelerated {
		errs = append(errs, ns.Close())
		delete(h.accelerated, c)
	}
	h.mu.Unlock()
	for m := range maps.Values(h.maps) {
		errs = append(errs, m.Close())
	}
	for _, ps := range []programs{h.root, h.proxy, h.node, h.lease} {
		for p := range maps.Values(ps) {
			errs = append(errs, p.Close())
		}
	}
	return errors.Join(errs...)
}
