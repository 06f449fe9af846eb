package app

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// dropCollector reads the programs' counters when it is asked.
type dropCollector struct {
	hooks *redirect.Hooks
	desc  *prometheus.Desc
}

func newDropCollector(hooks *redirect.Hooks) *dropCollector {
	return &dropCollector{hooks, prometheus.NewDesc("ambit_node_dropped_total",
		"Connections and packets of pods that eBPF redirection refused rather than let past the mesh, by reason (ambit-node's log names the pods).",
		[]string{"reason"}, nil)}
}

func (c *dropCollector) Describe(out chan<- *prometheus.Desc) { out <- c.desc }

func (c *dropCollector) Collect(out chan<- prometheus.Metric) {
	drops, err := c.hooks.Drops()
	if err != nil {
		out <- prometheus.NewInvalidMetric(c.desc, err)
		return
	}
	for reason, n := range drops {
		out <- prometheus.MustNewConstMetric(c.desc, prometheus.CounterValue, float64(n), reason)
	}
}

const (
	dropLogPause = 30 * time.Second // between two lines about one pod and reason
	dropLogPods  = 1024             // pods and reasons between two such; what exceeds them is in the metric alone
)

// dropLog warns of drops: of the first at once, of those that follow by their sum.
// Its methods run on one goroutine each.
type dropLog struct {
	watch func(context.Context, func(redirect.Drop)) error
	name  func(cookie uint64) string
	log   *slog.Logger
}

type dropKey struct {
	cookie uint64
	reason string
}

// Run warns until ctx ends.
func (l *dropLog) Run(ctx context.Context) error {
	dropc := make(chan redirect.Drop, 64)
	donec := make(chan error, 1)
	go func() {
		donec <- l.watch(ctx, func(d redirect.Drop) {
			select {
			case dropc <- d:
			case <-ctx.Done():
			}
		})
	}()
	tick := time.NewTicker(dropLogPause)
	defer tick.Stop()
	// What was told since the last tick, with what came on top of it.
	seen := map[dropKey]*redirect.Drop{}
	for {
		select {
		case err := <-donec:
			return err
		case d := <-dropc:
			key := dropKey{d.Cookie, d.Reason}
			if sum, ok := seen[key]; ok {
				d.Count += sum.Count
				*sum = d
			} else if len(seen) < dropLogPods {
				l.warn(d)
				d.Count = 0
				seen[key] = &d
			}
		case <-tick.C:
			for key, d := range seen {
				if d.Count == 0 {
					delete(seen, key)
					continue
				}
				l.warn(*d)
				d.Count = 0
			}
		}
	}
}

func (l *dropLog) warn(d redirect.Drop) {
	args := []any{"pod", l.name(d.Cookie), "reason", d.Reason, "why", d.Meaning, "count", d.Count}
	for _, end := range []struct {
		key  string
		addr netip.AddrPort
	}{{"src", d.Local}, {"dst", d.Remote}} {
		if end.addr.IsValid() {
			args = append(args, end.key, end.addr)
		}
	}
	l.log.Warn("connections of a pod are refused", args...)
}

// podNames knows pods by their namespaces' cookies.
type podNames struct {
	status *agent.StatusDir
	names  map[uint64]string
	read   time.Time
}

// name reads the statuses again for a namespace that it does not know, but not all
// the time: those of pods outside the mesh never get there.
func (p *podNames) name(cookie uint64) string {
	if name, ok := p.names[cookie]; ok {
		return name
	}
	if now := time.Now(); now.Sub(p.read) > time.Second {
		p.read, p.names = now, map[uint64]string{}
		pods, _ := p.status.List() // without those that cannot be read
		for _, s := range pods {
			if c, err := cookieAt(s.NetNS); err == nil {
				p.names[c] = s.Namespace + "/" + s.Name
			}
		}
	}
	if name, ok := p.names[cookie]; ok {
		return name
	}
	return "outside the mesh"
}

func cookieAt(path string) (uint64, error) {
	ns, err := netns.Open(path)
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	return ns.Cookie()
}
