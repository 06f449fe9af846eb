package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/ebpf/sockdiag"
)

// Connections that a pod had before it was enrolled pass no proxy. They are found
// once, right after the first rules, and remembered by the kernel's numbers for
// them in a file beside the pod's status, so that the next agent knows which they
// are; its time is where a drain begins.
//
//	first rules ─▶ meetOlder: list, reset half-open ones, write the file
//	each look   ─▶ tendOlder: reset what is due, count what is left

// maxOlder bounds what is remembered of one pod: connections beyond it are kept,
// whatever the annotation says.
const maxOlder = 1 << 16

const olderSuffix = ".older"

// older is a pod's file.
type older struct {
	Boot    string    `json:"boot"`  // numbers are of one run of the kernel
	NetNS   uint64    `json:"netns"` // and of one namespace
	Since   time.Time `json:"since"`
	Sockets []uint64  `json:"sockets"`

	retry time.Time // not before: the kernel refused
}

func (o *older) count() int {
	if o == nil {
		return 0
	}
	return len(o.Sockets)
}

// remaining are those of sockets that o is about.
func (o *older) remaining(sockets []sockdiag.Socket) []sockdiag.Socket {
	known := make(map[uint64]bool, len(o.Sockets))
	for _, c := range o.Sockets {
		known[c] = true
	}
	var out []sockdiag.Socket
	for _, s := range sockets {
		if known[s.Cookie] {
			out = append(out, s)
		}
	}
	return out
}

func cookies(sockets []sockdiag.Socket) []uint64 {
	out := make([]uint64, 0, min(len(sockets), maxOlder))
	for _, s := range sockets[:min(len(sockets), maxOlder)] {
		out = append(out, s.Cookie)
	}
	return out
}

// meetOlder finds out what is older than the rules that were just applied. Rules
// are in force whatever comes of it: who cannot list sockets enrols all the same.
func (w *worker) meetOlder(ctx context.Context, rules redirect.PodRules) {
	if w.older != nil {
		return
	}
	o, err := w.agent.cfg.Status.readOlder(w.uid, w.ns)
	if err != nil {
		w.log.Warn("what an earlier agent knew of older connections is lost", "err", err)
	}
	if o != nil {
		w.older = o
		return
	}
	var found redirect.Uncaptured
	halfOpen := 0
	err = w.agent.kernel(ctx, func() (err error) {
		if found, err = w.agent.cfg.Rules.Uncaptured(w.ns, rules); err != nil {
			return err
		}
		halfOpen, err = w.agent.cfg.Rules.Reset(w.ns, found.HalfOpen)
		return err
	})
	if err != nil && ctx.Err() == nil {
		w.log.Warn("connections older than the enrolment are not known in full", "err", err)
	}
	if n := len(found.Connections); n > maxOlder {
		w.log.Warn("more connections are older than the enrolment than are remembered", "found", n, "remembered", maxOlder)
	}
	w.agent.older.resets.Add(float64(halfOpen))
	w.setOlder(&older{
		Boot: bootID(), NetNS: w.ns.Inode(), Since: time.Now().UTC().Truncate(time.Second), Sockets: cookies(found.Connections),
	})
	if len(found.Connections)+halfOpen > 0 {
		w.log.Info("pod has connections that are older than its enrolment", "connections", len(found.Connections), "half_open_reset", halfOpen)
	}
}

func (w *worker) setOlder(o *older) {
	w.older = o
	if err := w.agent.cfg.Status.writeOlder(w.uid, o); err != nil {
		w.log.Error("older connections are not remembered beyond this agent", "err", err)
	}
}

// tendOlder does with older connections what the pod's annotation asks for, and
// counts them again if look is set.
func (w *worker) tendOlder(ctx context.Context, p Pod, rules redirect.PodRules, look bool) {
	if w.older.count() == 0 {
		return
	}
	due := p.OnEnrol.Reset && w.untilOlderEnd(p) <= 0
	if !due && !look {
		return
	}
	var left []sockdiag.Socket
	err := w.agent.kernel(ctx, func() error {
		found, err := w.agent.cfg.Rules.Uncaptured(w.ns, rules)
		if err != nil {
			return err
		}
		left = w.older.remaining(found.Connections)
		if !due {
			return nil
		}
		n, err := w.agent.cfg.Rules.Reset(w.ns, left)
		if err != nil {
			return err
		}
		w.agent.older.resets.Add(float64(n))
		w.log.Info("older connections were reset", "connections", n, "on_enrol", p.OnEnrol.String())
		left = nil
		return nil
	})
	if err != nil {
		if ctx.Err() == nil {
			w.log.Warn("older connections cannot be ended or counted", "err", err)
			w.older.retry = time.Now().Add(retryMax)
		}
		return
	}
	if len(left) != w.older.count() {
		o := *w.older
		o.Sockets = cookies(left)
		w.setOlder(&o)
	}
}

// untilOlderEnd is how long the pod's older connections have yet, if they end at all.
func (w *worker) untilOlderEnd(p Pod) time.Duration {
	at := w.older.Since.Add(p.OnEnrol.After)
	if w.older.retry.After(at) {
		at = w.older.retry
	}
	return time.Until(at)
}

// sooner is when to look again: after d (0: never), or when older connections end.
func (w *worker) sooner(d time.Duration, p Pod) time.Duration {
	if w.older.count() == 0 || !p.OnEnrol.Reset {
		return d
	}
	end := max(w.untilOlderEnd(p), time.Millisecond)
	if d == 0 {
		return end
	}
	return min(d, end)
}

// bootID names this run of the kernel; "" if it does not tell.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func (d *StatusDir) olderPath(uid string) (string, error) {
	if !validUID(uid) {
		return "", fmt.Errorf("pod uid %q cannot name a file", uid)
	}
	return filepath.Join(d.dir, uid+olderSuffix), nil
}

// readOlder returns nil if there is no file, or one of another namespace.
func (d *StatusDir) readOlder(uid string, ns *netns.NS) (*older, error) {
	path, err := d.olderPath(uid)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	o := &older{}
	if err == nil {
		err = json.Unmarshal(data, o)
	}
	if err != nil {
		return nil, fmt.Errorf("read older connections %s: %w", path, err)
	}
	if o.Boot != bootID() || o.NetNS != ns.Inode() {
		return nil, nil
	}
	return o, nil
}

func (d *StatusDir) writeOlder(uid string, o *older) error {
	path, err := d.olderPath(uid)
	if err != nil {
		return err
	}
	data, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("encode older connections: %w", err)
	}
	temp := filepath.Join(d.dir, tempPrefix+uid+olderSuffix)
	if err := os.WriteFile(temp, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("write older connections: %w", err)
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("write older connections: %w", err)
	}
	return nil
}

func (d *StatusDir) removeOlder(uid string) error {
	path, err := d.olderPath(uid)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove older connections: %w", err)
	}
	return nil
}

// Older lists the connections of an enrolled pod that are older than its
// enrolment, and when that was. It enters the pod's namespace, which takes an
// agent's rights.
func (d *StatusDir) Older(s Status) (since time.Time, flows []sockdiag.Socket, err error) {
	if s.NetNS == "" {
		return time.Time{}, nil, nil
	}
	ns, err := netns.Open(s.NetNS)
	if err != nil {
		return time.Time{}, nil, err
	}
	defer ns.Close()
	o, err := d.readOlder(s.UID, ns)
	if o.count() == 0 || err != nil {
		return time.Time{}, nil, err
	}
	all, err := sockdiag.List(ns, sockdiag.Connections)
	if err != nil {
		return time.Time{}, nil, err
	}
	return o.Since, o.remaining(all), nil
}

// olderMetrics are the agent's about them.
type olderMetrics struct{ resets prometheus.Counter }

func newOlderMetrics(r prometheus.Registerer, count func() int) *olderMetrics {
	m := &olderMetrics{resets: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "ambit_node_pre_enrolment_resets_total",
		Help: "Connections older than their pod's enrolment that were reset: half-open ones, and what ambit.dev/on-enrol asks for.",
	})}
	if r != nil {
		r.MustRegister(m.resets, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "ambit_node_pre_enrolment_connections",
			Help: "Open connections that are older than their pod's enrolment and do not pass the proxy.",
		}, func() float64 { return float64(count()) }))
	}
	return m
}

func (a *Agent) olderCount() (n int) {
	a.eachWorker(func(w *worker) {
		w.mu.Lock()
		defer w.mu.Unlock()
		n += w.shown.PreEnrolment
	})
	return n
}
