package app

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/cgroup"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/xds/boot"
)

const (
	kindAuto     = "auto"
	kindEBPF     = "ebpf"
	kindNFTables = "nftables"
)

const inTheWay = "programs of others change pods' connections before the mesh sees them: with --redirect=auto a restart of the agent falls back to nftables"

// redirector is how this node's pods are captured.
type redirector struct {
	kind   string
	reason string
	table  *redirect.Dataplane
	bare   bool            // the kernel has no nftables, so no pod has rules
	hooks  *redirect.Hooks // in force, or with state that nftables succeeds; nil: neither
	cfg    redirect.HooksConfig
	home   uint64 // the node's own network namespace, by number
	log    *slog.Logger

	mu        sync.Mutex
	obstacles []string
}

// choose decides how pods are captured and opens it. Whatever the choice, state
// that the other redirector left is succeeded, never dropped: see rules.
func choose(cfg Config, home *netns.NS, log *slog.Logger) (*redirector, error) {
	r := &redirector{log: boot.Scoped(log, "redirect"), home: home.Inode()}
	// Rules want it too, if it is one; open completes it for programs.
	if root, err := filepath.Abs(cfg.CgroupRoot); err == nil && cfg.CgroupRoot != "" {
		if root, err = filepath.EvalSymlinks(root); err == nil {
			r.cfg.CgroupRoot = root
		}
	}
	var err error
	if r.table, err = redirect.New(cfg.redirect(log)); err != nil {
		return nil, err
	}
	if _, err := r.table.Present(home); err != nil && cfg.Redirect != kindNFTables {
		r.bare = true
		r.log.Info("this kernel has no nftables to fall back on", "err", err)
	}
	found, pods, err := redirect.Pinned(cfg.BPFFSDir)
	if err != nil {
		return nil, err
	}
	if cfg.Redirect == kindNFTables && !found {
		r.kind, r.reason = kindNFTables, "--redirect=nftables"
		return r, nil
	}
	why := r.open(cfg, home, log)
	if errors.Is(why, unix.EPERM) {
		if lacking, err := missing(kindEBPF); err == nil && len(lacking) > 0 {
			why = fmt.Errorf("%w; missing: %s", why, strings.Join(lacking, ", "))
		}
	}
	switch {
	case why == nil && cfg.Redirect != kindNFTables:
		r.kind, r.reason = kindEBPF, "the kernel and the node have all it takes"
		if cfg.Redirect == kindEBPF {
			r.reason = "--redirect=ebpf"
		}
	case cfg.Redirect == kindEBPF:
		r.close()
		return nil, fmt.Errorf("--redirect=ebpf: %w", why)
	case r.hooks == nil && pods > 0:
		// Two redirectors at once are one too many when nobody can end the first.
		return nil, fmt.Errorf("%d pods of this node are captured by eBPF programs pinned in %s, which cannot be opened (ambit-node cleanup takes them away): %w", pods, cfg.BPFFSDir, why)
	default:
		r.kind, r.reason = kindNFTables, "--redirect=nftables"
		if cfg.Redirect == kindAuto {
			r.reason = "eBPF is not possible here: " + oneLine(why)
		}
		if pods == 0 {
			// Nothing to succeed, and a start that failed half way leaves nothing.
			r.close()
			if err := redirect.Unpin(cfg.BPFFSDir); err != nil {
				return nil, fmt.Errorf("remove eBPF redirection that nobody uses: %w", err)
			}
		}
		if pods > 0 {
			r.log.Warn("pods of this node that eBPF programs captured change over to nftables, which holds less", "pods", pods, "why", r.reason, "limits", r.table.Limits())
		}
	}
	return r, nil
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// open opens the programs and says why they cannot or should not be used; then
// r.hooks may be there all the same, for the state they have.
func (r *redirector) open(cfg Config, home *netns.NS, log *slog.Logger) error {
	hc := redirect.HooksConfig{CgroupRoot: cfg.CgroupRoot, Dir: cfg.BPFFSDir, Node: home, Probes: cfg.HostProbes, Logger: boot.Scoped(log, "redirect")}
	var err error
	if hc.CgroupRoot == "" {
		mount, err := cgroup.Mount()
		if err == nil {
			hc.CgroupRoot, err = cgroup.Pods(mount)
		}
		if err != nil {
			return fmt.Errorf("%w (--cgroup-root names another)", err)
		}
	}
	if hc.CgroupRoot, err = filepath.Abs(hc.CgroupRoot); err == nil {
		hc.CgroupRoot, err = filepath.EvalSymlinks(hc.CgroupRoot)
	}
	if err != nil {
		return fmt.Errorf("find cgroup: %w", err)
	}
	if err := makeBPFDir(cfg.BPFFSDir); err != nil {
		return err
	}
	hooks, err := redirect.OpenHooks(hc)
	if err != nil {
		return err
	}
	r.hooks, r.cfg = hooks, hc
	if r.obstacles, err = hooks.Obstacles(); err != nil {
		return err
	}
	if cfg.Redirect != kindAuto {
		for _, o := range r.obstacles {
			r.log.Warn(inTheWay, "obstacle", o)
		}
		return nil
	}
	if len(r.obstacles) > 0 {
		return errors.New(strings.Join(r.obstacles, "; "))
	}
	return hooks.Try()
}

// makeBPFDir makes dir on the BPF file system that its parent is on. It mounts
// none: pins in a mount of the agent's own would end with the agent, and capture
// with them.
func makeBPFDir(dir string) error {
	parent := filepath.Dir(dir)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.BPF_FS_MAGIC {
		return nil
	}
	if err := unix.Statfs(parent, &st); err != nil || st.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("%s is not on a BPF file system (on the node itself: mount -t bpf bpffs %s; or --bpffs-dir)", dir, parent)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make directory for pinned programs: %w", err)
	}
	return nil
}

// rules are what the agent captures pods with.
func (r *redirector) rules() agent.Rules {
	switch {
	case r.kind == kindEBPF && r.bare:
		return r.hooks
	case r.kind == kindEBPF:
		return &redirect.Succession{Next: r.hooks, Former: r.table}
	case r.hooks != nil:
		return &redirect.Succession{Next: r.table, Former: r.hooks}
	default:
		return r.table
	}
}

// into adds to an agent's configuration what the redirector needs of it.
func (r *redirector) into(c *agent.Config) {
	rules := r.rules()
	c.Rules, c.Via, c.Verify = rules, r.kind, r.verify
	if s, ok := rules.(*redirect.Succession); ok {
		c.Waiting = s.Waiting
	}
	if r.hooks == nil {
		return
	}
	c.Rebuilt, c.Ready = r.hooks.Rebuilt(), r.hooks.Ready
	if r.kind == kindEBPF {
		c.Listening = r.hooks.Listening
		c.Resolves = agent.ResolverListensToAll
	}
}

// leases are nil, and say why, where acceleration is not possible.
func (r *redirector) leases() (*redirect.Leases, string) {
	if r.kind != kindEBPF {
		return nil, "it takes eBPF redirection, and pods are captured with " + r.kind
	}
	l, err := r.hooks.NewLeases()
	if err != nil {
		return nil, oneLine(err)
	}
	return l, ""
}

// verify runs in the agent's loop.
func (r *redirector) verify() {
	if r.hooks == nil {
		return
	}
	if err := r.hooks.Prune(); err != nil {
		r.log.Warn("programs of pods that are gone stay", "err", err)
	}
	if r.kind != kindEBPF {
		// All pods have changed over once none has programs any more.
		if found, pods, err := redirect.Pinned(r.cfg.Dir); err == nil && found && pods == 0 {
			if err := r.hooks.Uninstall(); err != nil {
				r.log.Warn("eBPF programs that nobody uses stay", "err", err)
				return
			}
			r.log.Info("eBPF programs are removed: all pods are captured by nftables")
		}
		return
	}
	now, err := r.hooks.Obstacles()
	if err != nil {
		r.log.Warn("cannot see whether programs of others run before the mesh's", "err", err)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if slices.Equal(now, r.obstacles) {
		return
	}
	for _, o := range now {
		if !slices.Contains(r.obstacles, o) {
			r.log.Warn(inTheWay, "obstacle", o)
		}
	}
	if len(now) == 0 {
		r.log.Info("no program of others runs before the mesh's any more")
	}
	r.obstacles = now
}

// nodeStatus describes the choice.
func (r *redirector) nodeStatus(requested string, missing []string) agent.NodeStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := agent.NodeStatus{Redirector: r.kind, Requested: requested, Reason: r.reason, Obstacles: slices.Clone(r.obstacles), Missing: missing}
	if r.kind == kindNFTables {
		for _, l := range r.table.Limits() {
			s.Limits = append(s.Limits, string(l))
		}
	} else if slices.Contains(r.hooks.Limits(), redirect.LimitProbes) {
		s.Limits = append(s.Limits, string(redirect.LimitProbes))
	}
	return s
}

func (r *redirector) register(reg prometheus.Registerer) {
	for _, kind := range []string{kindEBPF, kindNFTables} {
		g := prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "ambit_node_redirector", Help: "1 for the redirector that captures this node's pods.",
			ConstLabels: prometheus.Labels{"redirector": kind},
		})
		if kind == r.kind {
			g.Set(1)
		}
		reg.MustRegister(g)
	}
	if r.hooks != nil {
		reg.MustRegister(newDropCollector(r.hooks))
	}
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "ambit_node_redirect_obstacles", Help: "Programs of others that change connections before the mesh sees them.",
	}, func() float64 {
		r.mu.Lock()
		defer r.mu.Unlock()
		return float64(len(r.obstacles))
	}))
}

func (r *redirector) close() {
	if r.hooks != nil {
		_ = r.hooks.Close() // descriptors
		r.hooks = nil
	}
}
