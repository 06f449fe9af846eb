package app

import (
	"cmp"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/delta"
	"github.com/ambit-mesh/ambit/xds/derive"
	"github.com/ambit-mesh/ambit/xds/dir"
)

// pipeline turns a change of the source into a change of what is served, and
// says what is wrong with it.
type pipeline struct {
	// immutable after assembly
	engine *derive.Engine
	store  *delta.Store
	log    *slog.Logger
	push   func()
	// announce tells proxies that the trust domain or its aliases changed.
	announce func()
	ready    func()
	derived  chan struct{} // closed after the first change

	// owned by apply
	trustDomain string              // in force
	domains     []string            // with its aliases
	reported    map[string]struct{} // problems and conditions in the log already
	conditions  map[string]derive.Condition

	mu     sync.RWMutex
	report report // guarded by mu
}

// report is the state of the source.
type report struct {
	kinds      map[dir.Key]struct{}
	objects    map[string]int
	problems   []dir.Problem
	unenforced map[string]int
	conditions []derive.Condition // those that are not True
	changed    time.Time
	changes    uint64
	took       time.Duration
}

func newPipeline(e *derive.Engine, s *delta.Store, log *slog.Logger, ready func()) *pipeline {
	return &pipeline{
		engine: e, store: s, log: log, ready: ready, push: func() {}, announce: func() {}, derived: make(chan struct{}),
		trustDomain: e.TrustDomain(),
		reported:    map[string]struct{}{}, conditions: map[string]derive.Condition{},
		report: report{objects: map[string]int{}, kinds: map[dir.Key]struct{}{}},
	}
}

// apply takes in one change. It is called by one goroutine, the source's.
func (p *pipeline) apply(c dir.Change) {
	begin := time.Now()
	res := p.engine.Apply(c)
	if td := p.engine.TrustDomain(); td != p.trustDomain {
		p.log.Warn("the mesh configuration sets the trust domain: every identity changes with it, --trust-domain does not count",
			"trust_domain", td, "before", p.trustDomain)
		p.trustDomain = td
	}
	if domains := p.engine.TrustDomains(); !slices.Equal(domains, p.domains) {
		p.domains = domains
		p.announce()
	}
	p.record(c)
	upserts := make([]delta.Upsert, len(res.Upserts))
	for i, r := range res.Upserts {
		upserts[i] = delta.Upsert{Type: r.Type, Name: r.Name, Aliases: r.Aliases, Via: servicesOf(r), Message: r.Message, Bytes: r.Bytes}
	}
	removals := make([]delta.Removal, len(res.Removes))
	for i, r := range res.Removes {
		removals[i] = delta.Removal{Type: r.Type, Name: r.Name}
	}
	changed, err := p.store.Apply(upserts, removals)
	if err != nil {
		p.log.Error("resources not served", "error", err)
	}
	took := time.Since(begin)
	p.judge(c, res.Status, took)
	if changed > 0 {
		p.push()
	}
	p.log.Debug("source applied", "objects", len(c.Upserts), "deleted", len(c.Deletes), "resources", changed, "duration", took)
	select {
	case <-p.derived:
	default:
		p.log.Info("source read", "objects", len(c.Upserts), "resources", changed, "duration", took)
		close(p.derived)
		p.ready()
	}
}

// servicesOf lists the services of a workload: a proxy that subscribes to a
// service by name needs its endpoints too.
func servicesOf(r derive.Resource) []string {
	a, ok := r.Message.(*workload.Address)
	if !ok || a.GetWorkload() == nil {
		return nil
	}
	return slices.Sorted(maps.Keys(a.GetWorkload().GetServices()))
}

// record keeps what status pages ask about.
func (p *pipeline) record(c dir.Change) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := &p.report
	for _, k := range c.Deletes {
		if _, ok := r.kinds[k]; ok {
			delete(r.kinds, k)
			if r.objects[k.Kind]--; r.objects[k.Kind] == 0 {
				delete(r.objects, k.Kind)
			}
		}
	}
	for _, o := range c.Upserts {
		k := o.Key()
		if _, ok := r.kinds[k]; !ok {
			r.kinds[k] = struct{}{}
			r.objects[k.Kind]++
		}
	}
}

// judge logs what became wrong since the last change, each thing once, and
// keeps all of it for status.
func (p *pipeline) judge(c dir.Change, conditions []derive.Condition, took time.Duration) {
	current := make(map[string]struct{}, len(c.Problems))
	for _, problem := range c.Problems {
		text := problem.String()
		current[text] = struct{}{}
		if _, known := p.reported[text]; !known {
			p.log.Warn("object not in force as written", "problem", text)
		}
	}
	for text := range p.reported {
		if _, still := current[text]; !still {
			p.log.Info("problem solved", "problem", text)
		}
	}
	p.reported = current
	p.judgeConditions(conditions)

	p.mu.Lock()
	before := p.report.unenforced
	p.report.problems, p.report.unenforced = c.Problems, maps.Clone(c.Unenforced)
	p.report.conditions = slices.SortedFunc(maps.Values(p.conditions), func(a, b derive.Condition) int {
		return cmp.Compare(conditionKey(a), conditionKey(b))
	})
	p.report.changed, p.report.took = time.Now(), took
	p.report.changes++
	p.mu.Unlock()
	if !maps.Equal(before, c.Unenforced) {
		p.log.Warn("kinds that this build does not enforce", "kinds", countsText(c.Unenforced))
	}
}

// judgeConditions takes the full list: what is no longer in it is solved.
func (p *pipeline) judgeConditions(conditions []derive.Condition) {
	current := map[string]derive.Condition{}
	for _, cond := range conditions {
		if cond.Status == "True" {
			continue
		}
		key := conditionKey(cond)
		current[key] = cond
		if before, known := p.conditions[key]; !known || before != cond {
			p.log.Warn("object not fully enforced", "kind", cond.Kind, "object", objectName(cond.Namespace, cond.Name),
				"reason", cond.Reason, "message", cond.Message)
		}
	}
	p.conditions = current
}

// objectName is "namespace/name", or the name of what is in no namespace.
func objectName(namespace, name string) string {
	if namespace == "" {
		return name
	}
	return namespace + "/" + name
}

func conditionKey(c derive.Condition) string {
	return c.Kind + "\x00" + c.Namespace + "\x00" + c.Name + "\x00" + c.Type
}

// countsText lists counts as "Kind 3, Other 1", by name.
func countsText(m map[string]int) string {
	if len(m) == 0 {
		return "none"
	}
	s := ""
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if s != "" {
			s += ", "
		}
		s += fmt.Sprintf("%s %d", k, m[k])
	}
	return s
}
