package flow

import (
	"context"
	"time"

	"github.com/ambit-mesh/ambit/xds/mesh"
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
	for v := c.t.cfg.View(); ; {
		c.t.hook("viewed")
		err := c.decide(v, &s, false)
		c.t.hook("decided")
		if err != nil {
			return err
		}
		now := c.t.cfg.View()
		if now.Generation == v.Generation {
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
	if !verdict.Allowed {
		return verdict, &DenyError{Verdict: verdict, Reason: verdict.Why()}
	}
	return verdict, nil
}

// Changed tells the table that the view moved. It never blocks: the store's
// writer calls it.
func (t *Table) Changed() {
	select {
	case t.wakec <- struct{}{}:
	default:
	}
}

// Run sweeps after changes and retires unused metric series.
func (t *Table) Run(ctx context.Context) error {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	last := t.cfg.View()
	t.sweep(nil, last)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.wakec:
			v := t.cfg.View()
			t.sweep(last, v)
			last = v
		case <-tick.C:
			t.metrics.retire(t.cfg.View().Mesh, time.Now())
		}
	}
}

// sweep re-decides the connections that the step from old to v can concern: all
// if a policy changed, else those whose own workload changed.
func (t *Table) sweep(old, v *store.View) {
	for _, c := range t.live() {
		c.mu.Lock()
		s, generation := c.subject, c.generation
		c.mu.Unlock()
		t.hook("sweeping")
		if s == nil || generation >= v.Generation || !concerns(old, v, generation, s.UID) {
			continue
		}
		if err := c.decide(v, s, true); err != nil {
			c.Cut(err)
		}
	}
}

func concerns(old, v *store.View, generation uint64, uid string) bool {
	// A decision older than the last sweep missed a step in between.
	if old == nil || generation < old.Generation || old.Policies != v.Policies {
		return true
	}
	return changed(old.Mesh, v.Mesh, uid)
}

func changed(old, now *mesh.Snapshot, uid string) bool { return old.Workload(uid) != now.Workload(uid) }
