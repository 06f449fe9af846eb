package hbone

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

// tunnelSet is all tunnels of one key. Small flows share, a busy one is left alone.
type tunnelSet struct {
	d   *Dialer
	key Key
	// account pays for all of it: what was acquired must come back to the same one, also when the pod has gone meanwhile.
	account *ledger.Account

	users int // Connects under way; guarded by d.mu

	mu      sync.Mutex
	tunnels []*tunnel // guarded by mu
	dials   []*dialing
}

// dialing is a dial under way and those who will share what it opens.
type dialing struct {
	cancel   context.CancelCauseFunc
	donec    chan struct{}
	promised int          // guarded by set.mu: slots of the tunnel to be
	called   atomic.Int64 // since when the peer's TCP is asked and has not answered, ns; 0: it is not

	t   *tunnel // set before donec closes
	err error
}

// errStale ends a dial whose configuration is out of date; whoever waited dials anew.
var errStale = errors.New("dial superseded")

func newTunnelSet(d *Dialer, k Key) *tunnelSet {
	return &tunnelSet{d: d, key: k, account: d.cfg.Account(k)}
}

// acquire returns a tunnel with a slot reserved in it.
func (set *tunnelSet) acquire(ctx context.Context, r ConnectRequest) (t *tunnel, reused bool, err error) {
	for {
		t, dg := set.pick(ctx)
		if t != nil {
			return t, true, nil
		}
		if err := dg.await(ctx, r); err != nil {
			set.abandon(dg)
			return nil, false, &DialError{dg.stage(err), set.key.Addr, err}
		}
		switch {
		case dg.err == nil:
			return dg.t, false, nil
		case errors.Is(dg.err, ErrGone) && r.elsewhere():
			return nil, false, &DialError{StageTCP, set.key.Addr, ErrGone}
		case (errors.Is(dg.err, errStale) || errors.Is(dg.err, ErrGone)) && !set.d.isClosed():
			continue
		}
		if t := set.busyTunnel(); t != nil {
			return t, true, nil // it was only for the sake of others that we wanted another
		}
		return nil, false, dg.err
	}
}

// await waits until the dial has ended and returns nil, or why it is not waited for any more: whose peer says nothing at
// all to a SYN, nor to the next one or two, turns elsewhere if it can. Nothing was sent yet.
func (dg *dialing) await(ctx context.Context, r ConnectRequest) error {
	if r.Elsewhere == nil {
		select {
		case <-dg.donec:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	timer := time.NewTimer(dg.patience(r))
	defer timer.Stop()
	for {
		select {
		case <-dg.donec:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timer.C:
		}
		wait := dg.patience(r)
		if wait == 0 {
			return errNoAnswer
		}
		timer.Reset(wait)
	}
}

// patience is how long to wait before looking again, 0 if there is no reason to.
func (dg *dialing) patience(r ConnectRequest) time.Duration {
	at := dg.called.Load()
	if at == 0 {
		return answerTick
	}
	if left := Silence - time.Since(time.Unix(0, at)); left > 0 {
		return left
	}
	if r.elsewhere() {
		return 0
	}
	return answerTick
}

func (dg *dialing) stage(err error) Stage {
	if err == errNoAnswer {
		return StageTCP
	}
	return StageLocal
}

// surplusIdle is how long a tunnel stays without streams that was opened because many were wanted at once: a hundred of
// them keep some MiB on either side, and a few are enough for what comes next.
const surplusIdle = time.Minute

// patience is how long t may be idle.
func (set *tunnelSet) patience(t *tunnel) time.Duration {
	set.mu.Lock()
	defer set.mu.Unlock()
	if slices.Index(set.tunnels, t) >= set.d.cfg.MaxTunnels {
		return min(surplusIdle, set.d.cfg.IdleTimeout)
	}
	return set.d.cfg.IdleTimeout
}

func (d *Dialer) isClosed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.closed
}

// pick takes the least loaded quiet tunnel; failing that it opens another while there are few, failing that it takes
// the least loaded busy one. Dials are shared by as many as the new tunnel will surely hold.
func (set *tunnelSet) pick(ctx context.Context) (*tunnel, *dialing) {
	set.mu.Lock()
	defer set.mu.Unlock()
	now := time.Now()
	quiet, busy := set.leastLoadedLocked(now)
	if quiet != nil && quiet.reserve() {
		return quiet, nil
	}
	if busy != nil && len(set.tunnels)+len(set.dials) >= set.d.cfg.MaxTunnels && busy.reserve() {
		return busy, nil
	}
	for _, dg := range set.dials {
		if dg.promised > 0 && dg.promised < min(set.d.cfg.MaxStreams, assumedMaxStreams) { // none: it is being given up
			dg.promised++
			return nil, dg
		}
	}
	return nil, set.dialLocked(ctx)
}

func (set *tunnelSet) busyTunnel() *tunnel {
	set.mu.Lock()
	defer set.mu.Unlock()
	quiet, busy := set.leastLoadedLocked(time.Now())
	for _, t := range []*tunnel{quiet, busy} {
		if t != nil && t.reserve() {
			return t
		}
	}
	return nil
}

func (set *tunnelSet) leastLoadedLocked(now time.Time) (quiet, busy *tunnel) {
	var quietLoad, busyLoad int
	for _, t := range set.tunnels {
		n, usable := t.load(now)
		switch {
		case !usable:
		case t.busy(now) && n > 0:
			if busy == nil || n < busyLoad {
				busy, busyLoad = t, n
			}
		default:
			if quiet == nil || n < quietLoad {
				quiet, quietLoad = t, n
			}
		}
	}
	return quiet, busy
}

func (set *tunnelSet) dialLocked(ctx context.Context) *dialing {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	dg := &dialing{cancel: cancel, donec: make(chan struct{}), promised: 1}
	set.dials = append(set.dials, dg)
	set.d.wg.Add(1)
	go set.runDial(ctx, dg)
	return dg
}

func (set *tunnelSet) runDial(ctx context.Context, dg *dialing) {
	defer set.d.wg.Done()
	t, err := set.d.dial(ctx, set, dg)
	if cause := context.Cause(ctx); err != nil && (errors.Is(cause, errStale) || errors.Is(cause, ErrGone)) {
		err = cause
	}

	set.mu.Lock()
	set.dials = slices.DeleteFunc(set.dials, func(o *dialing) bool { return o == dg })
	dg.t, dg.err = t, err
	if err == nil {
		t.mu.Lock()
		t.reserved = dg.promised
		ended := t.err != nil
		t.mu.Unlock()
		if !ended {
			set.tunnels = append(set.tunnels, t)
		}
	}
	set.mu.Unlock()
	dg.cancel(nil)
	close(dg.donec)

	set.d.mu.Lock()
	set.d.forgetLocked(set)
	set.d.mu.Unlock()
}

// abandon gives up the slot in a tunnel that is being dialled. When nobody else waits, the dial ends too.
func (set *tunnelSet) abandon(dg *dialing) {
	set.mu.Lock()
	select {
	case <-dg.donec:
		set.mu.Unlock()
		if dg.t != nil {
			dg.t.unreserve()
		}
		return
	default:
	}
	if !slices.Contains(set.dials, dg) { // done but for closing donec
		set.mu.Unlock()
		<-dg.donec
		if dg.t != nil {
			dg.t.unreserve()
		}
		return
	}
	dg.promised--
	none := dg.promised == 0
	set.mu.Unlock()
	if none {
		dg.cancel(context.Canceled)
	}
}

// remove forgets a tunnel that has ended.
func (set *tunnelSet) remove(t *tunnel) {
	set.mu.Lock()
	set.tunnels = slices.DeleteFunc(set.tunnels, func(o *tunnel) bool { return o == t })
	set.mu.Unlock()
	set.d.mu.Lock()
	set.d.forgetLocked(set)
	set.d.mu.Unlock()
}

func (set *tunnelSet) empty() bool {
	set.mu.Lock()
	defer set.mu.Unlock()
	return len(set.tunnels) == 0 && len(set.dials) == 0
}

// take empties the set for cut and drain; dials under way are ended with cause.
func (set *tunnelSet) take(cause error) []*tunnel {
	set.mu.Lock()
	defer set.mu.Unlock()
	for _, dg := range set.dials {
		dg.cancel(cause)
	}
	return slices.Clone(set.tunnels)
}

func (set *tunnelSet) cut(err error) {
	for _, t := range set.take(err) {
		t.cut(err)
	}
}

func (set *tunnelSet) drain() {
	for _, t := range set.take(errStale) {
		t.drain()
	}
}
