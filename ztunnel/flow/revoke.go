package flow

import (
	"context"
	"time"

	"github.com/ambit-mesh/ambit/xds/policy"
	"github.com/ambit-mesh/ambit/xds/store"
)

// Subject is what a connection is judged by: the destination workload, looked
// up anew at each decision, and the connection as policy sees it.
type Subject struct {
	UID  string
	Conn policy.Conn
}

// DenyError is a policy's refusal. Live says that it came after the start.
type DenyError struct {
	Verdict policy.Verdict
	Reason  string
	Live    bool
}

func (e *DenyError) Error() string {
	if e.Live {
		return "connection closed due to policy change: " + e.Reason
	}
	return "connection closed due to policy rejection: " + e.Reason
}

// Why is the stable sentence of the decision.
func (e *DenyError) Why() string { return e.Reason }

// Authorize decides the connection and keeps the decision current: from now on
// a change that denies it cuts it with a *DenyError.
//
// The loop closes the gap to a concurrent sweep. The connection is in the
// table already, so a sweep that starts after the decision is recorded
// re-decides it; one that started before belongs to a generation that the
// second look at the view sees.
func (c *Conn) Authorize(s Subject) error {
	defer c.Decided()
	for v := c.t.cfg.View(); ; {
		c.t.hook("viewed")
		err := c.decide(v, &s, false)
		c.t.hook("decided")
		if err != nil {
			c.told(err)
			return err
		}
		now := c.t.cfg.View()
		if now.Generation == v.Generation {
			c.told(nil)
			return nil
		}
		v = now
	}
}

// decide judges under v, unless a newer configuration decided already.
func (c *Conn) decide(v *store.View, s *Subject, live bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.generation > v.Generation && c.subject != nil {
		return nil
	}
	verdict, err := judge(v, s)
	c.subject, c.generation, c.verdict = s, v.Generation, verdict
	if err != nil {
		err.Live = live
		return err
	}
	return nil
}

func judge(v *store.View, s *Subject) (policy.Verdict, *DenyError) {
	w := v.Mesh.Workload(s.UID)
	if w == nil {
		// Nothing says which policies apply, so none can allow.
		return policy.Verdict{}, &DenyError{Reason: "workload " + s.UID + " is no longer in the mesh"}
	}
	verdict := v.Policies.Authorize(w.Namespace, w.Policies, s.Conn)
	verdict.StrictBy = w.StrictBy
	if !verdict.Allowed {
		return verdict, &DenyError{Verdict: verdict, Reason: verdict.Why()}
	}
	return verdict, nil
}

// maxPending bounds what is remembered of changes between two sweeps; beyond it
// the sweep re-decides everything.
const maxPending = 10_000

// step is the change from one view to a later one, from commits without a gap.
type step struct {
	from, to  uint64 // generations
	workloads map[string]bool
	policies  []store.PolicyChange
	all       bool // too much to remember
}

// add appends the commit that made generation to out of from.
func (s *step) add(from, to uint64, ch store.Change) {
	if s.workloads == nil {
		s.from, s.workloads = from, map[string]bool{}
	} else if from != s.to {
		s.all = true // a commit in between was not told
	}
	s.to = to
	if s.all || len(s.workloads)+len(s.policies)+len(ch.Workloads)+len(ch.Policies) > maxPending {
		s.all, s.policies = true, nil
		clear(s.workloads)
		return
	}
	for _, w := range ch.Workloads {
		s.workloads[w.UID] = true
	}
	s.policies = append(s.policies, ch.Policies...)
}

// Changed is a store.Subscriber: it tells the table that the view moved, and
// what moved in it. It never blocks: the store's writer calls it.
func (t *Table) Changed(old, current *store.View, ch store.Change) {
	t.mu.Lock()
	t.pending.add(old.Generation, current.Generation, ch)
	t.mu.Unlock()
	select {
	case t.wakec <- struct{}{}:
	default:
	}
}

// Run sweeps after changes, retires unused metric series and writes the lines
// that sum up refusals.
func (t *Table) Run(ctx context.Context) error {
	tick, sums := time.NewTicker(time.Minute), time.NewTicker(t.cfg.SumInterval)
	defer tick.Stop()
	defer sums.Stop()
	defer t.writeSums() // what is still held back
	first := t.cfg.View()
	t.sweep(step{from: first.Generation, to: first.Generation, all: true}, first)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.wakec:
			t.mu.Lock()
			s := t.pending
			t.pending = step{}
			t.mu.Unlock()
			t.sweep(s, t.cfg.View())
		case <-tick.C:
			t.metrics.retire(t.cfg.View().Mesh, time.Now())
		case <-sums.C:
			t.writeSums()
		}
	}
}

func (t *Table) writeSums() {
	for _, s := range t.refusals.due(time.Now()) {
		s.write()
	}
}

// sweep re-decides, under v, the connections that the step can concern: their
// own workload changed, or a policy that counts for it. v is the step's view or
// a later one. The others' decisions are as good as made under the step's view,
// and are marked so: a later sweep then need not look back beyond its own step.
func (t *Table) sweep(st step, v *store.View) {
	known := map[string]bool{} // many connections lead to few workloads
	for _, c := range t.live() {
		c.mu.Lock()
		s, generation := c.subject, c.generation
		c.mu.Unlock()
		t.hook("sweeping")
		if s == nil || generation >= v.Generation {
			continue
		}
		concerned, ok := known[s.UID]
		if !ok {
			concerned = st.concerns(v, s.UID)
			known[s.UID] = concerned
		}
		// A decision older than the step missed a change before it.
		if generation >= st.from && !concerned {
			c.confirm(s, generation, st.to)
			continue
		}
		if err := c.decide(v, s, true); err != nil {
			c.Cut(err)
		}
	}
}

// concerns reports whether a decision for the workload could be another one
// after the step. A workload that the step did not change is the same in every
// view of the step, and so are the policies that it names.
func (st *step) concerns(v *store.View, uid string) bool {
	if st.all || st.workloads[uid] {
		return true
	}
	w := v.Mesh.Workload(uid)
	if w == nil {
		return true
	}
	for _, p := range st.policies {
		if p.Affects(w.Namespace, w.Policies) {
			return true
		}
	}
	return false
}

// confirm carries a decision over to a later generation that did not concern
// it, unless it was made anew meanwhile.
func (c *Conn) confirm(s *Subject, was, now uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.subject == s && c.generation == was && was < now {
		c.generation = now
	}
}
