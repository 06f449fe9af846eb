// Package app puts the node agent together: this is the only place where the
// source of pods, the rules, the hand-off and the status meet.
//
//	flags ─▶ Config ─▶ Run: logger, metrics, readiness
//	                    ├─ agent    ◀─ directory of YAML
//	                    │   ├─▶ redirect (pods' namespaces, programs, the node's probes)
//	                    │   └─▶ handoff  (ztunnel)
//	                    └─ health   /healthz/ready /metrics
//
// Nothing here runs twice or is shared beyond the goroutines of one Run.
package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/xds/boot"
)

// Config is what the flags say.
type Config struct {
	Source            string // dir:PATH[,PATH...]
	Node              string
	ZDSPath           string
	StatusDir         string
	CNISocket         string // on which the CNI plugin asks; "" for none
	StateDir          string // what outlives a reboot; "" for none
	Redirect          string // auto, ebpf, nftables
	CgroupRoot        string // cgroup2 directory above all pods; "": kubelet's
	BPFFSDir          string // where programs are pinned
	HealthAddr        string // "" for none
	ExcludeNamespaces []string
	HostProbes        bool // exempt the node's own connections to enrolled pods
	DNSCapture        bool // pods' DNS goes through the proxy unless they say otherwise
	ProbeV4, ProbeV6  netip.Addr
	Propagation       time.Duration
	Drain             time.Duration
	CleanupOnExit     bool
	LogFormat         string
	LogLevel          string
}

func (c Config) validate() error {
	var errs []error
	if _, err := c.dirs(); err != nil {
		errs = append(errs, err)
	}
	for _, f := range []struct{ flag, value string }{
		{"node", c.Node}, {"zds-path", c.ZDSPath}, {"status-dir", c.StatusDir}, {"bpffs-dir", c.BPFFSDir},
	} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("--%s is required", f.flag))
		}
	}
	if c.Redirect != kindAuto && c.Redirect != kindEBPF && c.Redirect != kindNFTables {
		errs = append(errs, fmt.Errorf("--redirect=%s: want auto, ebpf or nftables", c.Redirect))
	}
	return errors.Join(append(errs, boot.CheckLogging(c.LogFormat, c.LogLevel))...)
}

func (c Config) dirs() ([]string, error) {
	paths, ok := strings.CutPrefix(c.Source, "dir:")
	if !ok || paths == "" {
		return nil, fmt.Errorf("--source=%s: want dir:PATH[,PATH...]", c.Source)
	}
	return strings.Split(paths, ","), nil
}

func (c Config) redirect(log *slog.Logger) redirect.Config {
	return redirect.Config{ProbeV4: c.ProbeV4, ProbeV6: c.ProbeV6, Logger: boot.Scoped(log, "redirect")}
}

// Run is the agent's process until ctx ends.
func Run(ctx context.Context, cfg Config, stdout io.Writer) error {
	if err := cfg.validate(); err != nil {
		return err
	}
	q := boot.NewQueue(stdout, 0)
	defer q.Close()
	log, levels := boot.NewLogger(q, cfg.LogFormat, cfg.LogLevel)
	log.Info("ambit-node starts", "version", boot.Version, "node", cfg.Node)

	// Each pod holds a few descriptors.
	if _, err := boot.RaiseNoFile(); err != nil {
		log.Warn("limit of open files cannot be raised", "err", err)
	}
	if _, err := agent.OpenStatusDir(cfg.StatusDir); err != nil {
		return err
	}
	unlock, err := lockDir(cfg.StatusDir)
	if err != nil {
		return err
	}
	defer unlock()
	parts, err := assemble(cfg, log)
	if err != nil {
		return err
	}
	defer parts.close()
	if parts.redirect.hooks != nil {
		unlock, err := lockDir(cfg.BPFFSDir)
		if err != nil {
			return err
		}
		defer unlock()
	}
	group := boot.NewGroup(ctx, log)
	if cfg.HealthAddr != "" {
		ln, err := boot.Listen(ctx, cfg.HealthAddr)
		if err != nil {
			return fmt.Errorf("listen on --health-addr: %w", err)
		}
		mux := boot.AdminMux(boot.AdminConfig{Levels: levels, Handlers: map[string]http.Handler{
			"/healthz/ready": parts.ready, "/metrics": boot.Metrics(parts.registry),
		}})
		group.Go("health", func(ctx context.Context) error { return boot.ServeHTTP(ctx, ln, mux, log) })
	}
	if parts.cni != nil {
		group.Go("cni", parts.cni.Run)
	}
	group.Go("agent", parts.agent.Run)
	if parts.leases != nil {
		group.Go("leases", parts.leases.Run)
		group.Go("lease server", parts.granter.Run)
	}
	if hooks := parts.redirect.hooks; hooks != nil {
		names := &podNames{status: parts.status}
		group.Go("drops", (&dropLog{watch: hooks.WatchDrops, name: names.name, log: boot.Scoped(log, "redirect")}).Run)
	}
	err = group.Wait()
	if cfg.CleanupOnExit {
		n, cerr := parts.uninstall(cfg.BPFFSDir)
		log.Info("cleaned up", "pods", n)
		err = errors.Join(err, cerr)
	}
	log.Info("ambit-node ends", "err", err)
	return err
}

// Cleanup takes everything away that agents with the same status directory left.
func Cleanup(cfg Config, stdout io.Writer) error {
	status, err := agent.OpenStatusDir(cfg.StatusDir)
	if err != nil {
		return err
	}
	// An agent would go on capturing pods, with half of what that takes.
	for _, dir := range []string{cfg.StatusDir, cfg.BPFFSDir} {
		unlock, err := lockDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		defer unlock()
	}
	home, err := netns.Current()
	if err != nil {
		return err
	}
	defer home.Close()
	log := slog.New(slog.DiscardHandler)
	rules, err := redirect.New(cfg.redirect(log))
	if err != nil {
		return err
	}
	host, err := redirect.NewHost(cfg.redirect(log), home)
	if err != nil {
		return err
	}
	n, err := cleanup(status, host, rules, cfg.BPFFSDir)
	fmt.Fprintf(stdout, "%d pods are out of the mesh\n", n)
	return err
}

// cleanup takes all pods out of the mesh, whatever captures them. Programs are
// unpinned without being opened, so that any version's go.
func cleanup(status *agent.StatusDir, host *redirect.Host, rules *redirect.Dataplane, dir string) (int, error) {
	n, err := agent.Cleanup(status, leftovers{rules}, func() error {
		if err := redirect.Unpin(dir); err != nil {
			return err
		}
		_ = os.Remove(dir) // if it is empty and there
		return nil
	})
	return n, errors.Join(err, host.Remove())
}

// leftovers is what either redirector has inside a pod.
type leftovers struct{ *redirect.Dataplane }

func (l leftovers) Remove(ns *netns.NS) error {
	return errors.Join(l.Dataplane.Remove(ns), redirect.CleanPod(ns))
}
