package client

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
)

const (
	// demandTimeout is how long somebody waits for the control plane's word.
	demandTimeout = 5 * time.Second
	// absentFor is how long "there is no such thing" holds without asking again.
	// Meanwhile the key stays subscribed, so that what appears counts at once.
	absentFor = 10 * time.Second
	// maxDemands bounds the keys that wait or are known to be absent: some MiB,
	// whatever addresses an application tries. The absent ones make room.
	maxDemands = 16384
	// maxDemandBatch bounds the keys of one request.
	maxDemandBatch = 4096
)

// DemandError says that the control plane's word on a key is not known, which
// is not the same as the key being unknown to it.
type DemandError struct{ Key, Reason string }

func (e *DemandError) Error() string {
	return fmt.Sprintf("ask the control plane for %q: %s", e.Key, e.Reason)
}

// demands are the keys of the type on demand that are asked for. All methods
// may be called from any goroutine; send, begin and answer are Run's.
type demands struct {
	has   func(key string) bool
	wakec chan struct{} // cap 1: there are keys to send

	mu     sync.Mutex
	keys   map[string]*demand // guarded by mu; those pending or absent, what is there is in the handler
	absent int                // guarded by mu; of keys
	gaveUp []string           // guarded by mu; absent keys that made room, to be unsubscribed
}

type demand struct {
	donec   chan struct{} // closed when answered; err and until are set then
	sent    bool          // on the present stream
	waiting int
	until   time.Time // of absence; zero while pending
	err     error
}

func newDemands(has func(string) bool) *demands {
	return &demands{has: has, wakec: make(chan struct{}, 1), keys: map[string]*demand{}}
}

// Demand returns when the control plane has said of each key what it is, or
// that it is nothing; what it is has been applied by then. A *DemandError says
// that it did not say so in time. Any number may wait for one key.
func (c *Client) Demand(ctx context.Context, keys ...string) error {
	if c.demands == nil {
		return nil // everything is subscribed to
	}
	return c.demands.wait(ctx, keys)
}

func (d *demands) wait(ctx context.Context, keys []string) error {
	ctx, cancel := context.WithTimeout(ctx, demandTimeout)
	defer cancel()
	asked := make([]*demand, len(keys))
	for i, k := range keys { // ask for all before waiting for any
		w, err := d.enter(k)
		if err != nil {
			return err
		}
		if asked[i] = w; w != nil {
			defer d.leave(k, w)
		}
	}
	for i, k := range keys {
		w := asked[i]
		if w == nil {
			continue
		}
		select {
		case <-w.donec:
			if w.err != nil {
				return w.err
			}
		case <-ctx.Done():
			if ctx.Err() == context.DeadlineExceeded {
				return &DemandError{k, fmt.Sprintf("no answer within %s", demandTimeout)}
			}
			return context.Cause(ctx)
		}
	}
	return nil
}

// enter asks for a key that is neither there nor known to be absent.
func (d *demands) enter(key string) (*demand, error) {
	if d.has(key) {
		return nil, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.has(key) { // again, now that no answer can come unseen
		return nil, nil
	}
	w := d.keys[key]
	if w != nil && !w.until.IsZero() && !time.Now().Before(w.until) {
		d.dropLocked(key) // still subscribed; asked anew all the same
		w = nil
	}
	if w == nil {
		if len(d.keys) >= maxDemands && !d.makeRoomLocked() {
			return nil, &DemandError{key, fmt.Sprintf("%d keys are being asked for already", maxDemands)}
		}
		w = &demand{donec: make(chan struct{})}
		d.keys[key] = w
		d.wake()
	}
	w.waiting++
	return w, nil
}

// dropLocked forgets a key that is known to be absent.
func (d *demands) dropLocked(key string) {
	delete(d.keys, key)
	d.absent--
}

// makeRoomLocked gives up a key that is known to be absent, if there is one.
func (d *demands) makeRoomLocked() bool {
	if d.absent == 0 {
		return false
	}
	for k, w := range d.keys {
		if !w.until.IsZero() {
			d.dropLocked(k)
			d.gaveUp = append(d.gaveUp, k)
			return true
		}
	}
	panic("BUG: no absent key among those that are counted")
}

// leave forgets a key that nobody waits for and that was not sent.
func (d *demands) leave(key string, w *demand) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if w.waiting--; w.waiting == 0 && !w.sent && w.until.IsZero() && d.keys[key] == w {
		delete(d.keys, key)
	}
}

func (d *demands) wake() {
	select {
	case d.wakec <- struct{}{}:
	default:
	}
}

// begin puts the pending keys into the first request of a stream, with no
// version: wanted, never received. What was absent is asked anew when it is
// wanted again.
func (d *demands) begin(req *discovery.DeltaDiscoveryRequest) {
	req.ResourceNamesSubscribe, req.ResourceNamesUnsubscribe = []string{"*"}, []string{"*"} // nothing by itself
	d.mu.Lock()
	defer d.mu.Unlock()
	d.gaveUp = nil // a new stream has no subscriptions
	for k, w := range d.keys {
		if w.sent = false; !w.until.IsZero() {
			d.dropLocked(k)
			continue
		}
		if len(req.InitialResourceVersions) == 0 {
			req.InitialResourceVersions = map[string]string{}
		}
		if _, have := req.InitialResourceVersions[k]; !have && len(req.InitialResourceVersions) < maxDemandBatch {
			req.InitialResourceVersions[k] = ""
			w.sent = true
		}
	}
	d.wake() // for those that did not fit
}

// next is the next request for keys, nil if there is none.
func (d *demands) next(typeURL string) *discovery.DeltaDiscoveryRequest {
	d.mu.Lock()
	defer d.mu.Unlock()
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: typeURL}
	for k, w := range d.keys {
		if w.sent {
			continue
		}
		if len(req.ResourceNamesSubscribe) == maxDemandBatch {
			d.wake()
			break
		}
		w.sent = true
		req.ResourceNamesSubscribe = append(req.ResourceNamesSubscribe, k)
	}
	now := d.gaveUp[:min(len(d.gaveUp), maxDemandBatch)]
	if d.gaveUp = d.gaveUp[len(now):]; len(d.gaveUp) > 0 {
		d.wake()
	}
	for _, k := range now {
		if d.keys[k] == nil && !d.has(k) { // else it is wanted again
			req.ResourceNamesUnsubscribe = append(req.ResourceNamesUnsubscribe, k)
		}
	}
	if len(req.ResourceNamesSubscribe)+len(req.ResourceNamesUnsubscribe) == 0 {
		return nil
	}
	return req
}

// expire unsubscribes from what has been absent long enough.
func (d *demands) expire(now time.Time, typeURL string) *discovery.DeltaDiscoveryRequest {
	d.mu.Lock()
	defer d.mu.Unlock()
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: typeURL}
	for k, w := range d.keys {
		if w.until.IsZero() || now.Before(w.until) {
			continue
		}
		d.dropLocked(k)
		if !d.has(k) {
			req.ResourceNamesUnsubscribe = append(req.ResourceNamesUnsubscribe, k)
		}
	}
	if len(req.ResourceNamesUnsubscribe) == 0 {
		return nil
	}
	return req
}

// answer wakes those whose keys an applied response decides: by name, by alias
// or, since control planes may answer an address with something of another
// name, by what the handler knows now.
func (d *demands) answer(delta Delta, refused map[string]bool, now time.Time) {
	came, gone := map[string]error{}, map[string]bool{}
	for _, r := range delta.Added {
		var err error
		if refused[r.Name] {
			err = &DemandError{r.Name, "its description was refused"}
		}
		for _, key := range append(r.Aliases, r.Name) {
			if have, ok := came[key]; !ok || have != nil { // one that is applied is enough
				came[key] = err
			}
		}
	}
	for _, n := range delta.Removed {
		gone[n] = true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for k, w := range d.keys {
		err, named := came[k]
		switch {
		case !w.until.IsZero():
			continue
		case d.has(k), named:
			if !d.has(k) {
				w.err = err
			}
			delete(d.keys, k)
		case gone[k] && w.sent:
			w.until = now.Add(absentFor)
			d.absent++
		default:
			continue
		}
		close(w.donec)
	}
}
