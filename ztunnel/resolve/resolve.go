// Package resolve finds addresses of workloads that have only a host name.
//
//	Resolve ─→ cache ─→ one lookup per name, whoever asks ─→ an address of the client's family
//
// Names come from the control plane, and from applications that speak SOCKS; they
// are taken as fully qualified: no search domains apply. The package serves no
// DNS; that is ztunnel/dns.
//
// A Resolver is safe for use by any goroutine. It starts none: whoever asks for
// a name first looks it up, the others wait for the answer.
package resolve

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/mesh"
)

const (
	// goodFor is how long an answer holds. The standard library does not tell
	// the records' TTL; this is the TTL that the mesh's own DNS gives.
	goodFor = 30 * time.Second
	// badFor is how long a failure holds, so that a name that does not exist
	// costs one query per five seconds and not one per connection.
	badFor = 5 * time.Second
	// lookupTimeout bounds one lookup, both families together.
	lookupTimeout = 5 * time.Second
	// maxNames bounds the cache; it is the reference's size.
	maxNames = 4096
	// maxSeries bounds the label sets of the metric; what comes later counts
	// with labels "unknown".
	maxSeries = 1000
)

// Config of a Resolver.
type Config struct {
	// Lookup asks for all addresses of a name with its final dot; nil: the
	// process's own resolver, as in the reference.
	Lookup     func(ctx context.Context, host string) ([]netip.Addr, error)
	Registerer prometheus.Registerer
}

// Resolver is a bounded cache in front of DNS.
type Resolver struct {
	lookup  func(ctx context.Context, host string) ([]netip.Addr, error)
	queries *prometheus.CounterVec

	mu     sync.Mutex
	names  map[string]*answer  // guarded by mu, as is below
	series map[string]struct{} // label sets in use, joined
}

// answer is what is known of a name, or what somebody is looking up.
type answer struct {
	donec chan struct{} // closed when the fields below are set
	addrs []netip.Addr
	err   error
	until time.Time
}

// ErrNoAddress is a name that exists and has no address.
var ErrNoAddress = errors.New("the name has no address")

var labels = []string{"source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
	"source_principal", "source_app", "source_version", "source_cluster", "hostname"}

// New returns a Resolver.
func New(cfg Config) *Resolver {
	r := &Resolver{lookup: cfg.Lookup, names: map[string]*answer{}, series: map[string]struct{}{},
		queries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "istio_on_demand_dns_total",
			Help: "The total number of requests that used on-demand DNS.",
		}, labels)}
	if r.lookup == nil {
		r.lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(r.queries)
	}
	return r
}

// Resolve returns an address of host for a client: any of the family asked
// for, and failing that any.
func (r *Resolver) Resolve(ctx context.Context, client *mesh.Workload, host string, v6 bool) (netip.Addr, error) {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	r.count(client, host)
	a, first := r.enter(host)
	if first {
		r.fill(ctx, a, host)
	}
	select {
	case <-a.donec:
	case <-ctx.Done():
		return netip.Addr{}, fmt.Errorf("resolve %s: %w", host, context.Cause(ctx))
	}
	if a.err != nil {
		return netip.Addr{}, a.err
	}
	return choose(a.addrs, v6), nil
}

// enter finds the present answer or the lookup under way; failing both, the
// caller is the first and has to fill in the answer.
func (r *Resolver) enter(host string) (a *answer, first bool) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if a := r.names[host]; a != nil && !a.expired(now) {
		return a, false
	}
	if _, known := r.names[host]; !known && len(r.names) >= maxNames {
		r.makeRoomLocked(now)
	}
	a = &answer{donec: make(chan struct{})}
	r.names[host] = a
	return a, true
}

// expired answers are those that were given and are old; those under way are not.
func (a *answer) expired(now time.Time) bool {
	select {
	case <-a.donec:
		return !now.Before(a.until)
	default:
		return false
	}
}

// makeRoomLocked drops what is old, and if nothing is, any one: whoever waits
// for that one still gets it.
func (r *Resolver) makeRoomLocked(now time.Time) {
	for host, a := range r.names {
		if a.expired(now) {
			delete(r.names, host)
		}
	}
	for host := range r.names {
		if len(r.names) < maxNames {
			return
		}
		delete(r.names, host)
	}
}

// fill looks the name up, on behalf of all that wait: the end of whoever came
// first does not end it.
func (r *Resolver) fill(ctx context.Context, a *answer, host string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookupTimeout)
	defer cancel()
	defer close(a.donec)
	found, err := r.lookup(ctx, host+".")
	a.until = time.Now().Add(goodFor)
	for _, addr := range found {
		a.addrs = append(a.addrs, addr.Unmap())
	}
	if err == nil && len(a.addrs) == 0 {
		err = ErrNoAddress
	}
	if err != nil {
		a.err, a.until = fmt.Errorf("look up %s: %w", host, err), time.Now().Add(badFor)
	}
}

// choose draws one, of the family if there is one.
func choose(addrs []netip.Addr, v6 bool) netip.Addr {
	same := make([]netip.Addr, 0, len(addrs))
	for _, a := range addrs {
		if a.Is6() == v6 {
			same = append(same, a)
		}
	}
	if len(same) == 0 {
		same = addrs
	}
	return same[rand.IntN(len(same))]
}

// count adds to the client's and name's series, of which there is a bounded
// number.
func (r *Resolver) count(w *mesh.Workload, host string) {
	if w == nil {
		w = &mesh.Workload{Traits: &mesh.Traits{}}
	}
	values := []string{w.WorkloadName, w.CanonicalName, w.CanonicalRevision, w.Namespace, w.Identity.String(), w.CanonicalName, w.CanonicalRevision, w.ClusterID, host}
	for i, v := range values {
		if v == "" {
			values[i] = "unknown"
		}
	}
	key := strings.Join(values, "\x00")
	r.mu.Lock()
	_, known := r.series[key]
	if !known && len(r.series) < maxSeries {
		r.series[key] = struct{}{}
		known = true
	}
	r.mu.Unlock()
	if !known {
		for i := range values {
			values[i] = "unknown"
		}
	}
	r.queries.WithLabelValues(values...).Inc()
}
