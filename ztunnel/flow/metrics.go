package flow

import (
	"sync"
	"sync/atomic"
	"time"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/xds/mesh"
)

// maxDenied bounds the (reason, policy) pairs of denials; later policies count
// under "other".
const maxDenied = 1000

const unknown = "unknown"

// labels is the reference's traffic set. (The registry sorts them by name on
// output; nothing that reads metrics depends on their order.)
type labels struct {
	reporter                                                           string
	srcWorkload, srcService, srcRevision, srcNamespace, srcPrincipal   string
	srcApp, srcVersion, srcCluster                                     string
	dstService, dstServiceNamespace, dstServiceName                    string
	dstWorkload, dstCanonical, dstRevision, dstNamespace, dstPrincipal string
	dstApp, dstVersion, dstCluster                                     string
	flags, security                                                    string
	located                                                            bool
	srcRegion, srcZone, dstRegion, dstZone                             string
}

func labelsOf(r *Record, f Flag) labels {
	l := labels{
		reporter: r.Direction.reporter(), flags: string(f), security: unknown,
		dstService: r.Service, dstServiceNamespace: r.ServiceNS, dstServiceName: r.ServiceName,
		located: r.Src != nil || r.Dst != nil,
	}
	if w := r.Src; w != nil {
		l.srcWorkload, l.srcService, l.srcRevision, l.srcNamespace = w.WorkloadName, w.CanonicalName, w.CanonicalRevision, w.Namespace
		l.srcApp, l.srcVersion, l.srcCluster = w.CanonicalName, w.CanonicalRevision, w.ClusterID
		l.srcRegion, l.srcZone = w.Locality.Region, w.Locality.Zone
	}
	if w := r.Dst; w != nil {
		l.dstWorkload, l.dstCanonical, l.dstRevision, l.dstNamespace = w.WorkloadName, w.CanonicalName, w.CanonicalRevision, w.Namespace
		l.dstApp, l.dstVersion, l.dstCluster = w.CanonicalName, w.CanonicalRevision, w.ClusterID
		l.dstRegion, l.dstZone = w.Locality.Region, w.Locality.Zone
		// As in the reference, who the destination is said to be; that it was proven
		// is what connection_security_policy says.
		if !w.Identity.IsZero() {
			l.dstPrincipal = w.Identity.String()
		}
	}
	if r.mutualTLS() {
		l.security = "mutual_tls"
		l.srcPrincipal, l.dstPrincipal = r.SrcID.String(), r.DstID.String()
	}
	return l
}

func (l *labels) pairs() []*dto.LabelPair {
	out := make([]*dto.LabelPair, 0, 27)
	add := func(k, v string) {
		if v == "" {
			v = unknown
		}
		out = append(out, &dto.LabelPair{Name: proto.String(k), Value: proto.String(v)})
	}
	add("reporter", l.reporter)
	add("source_workload", l.srcWorkload)
	add("source_canonical_service", l.srcService)
	add("source_canonical_revision", l.srcRevision)
	add("source_workload_namespace", l.srcNamespace)
	add("source_principal", l.srcPrincipal)
	add("source_app", l.srcApp)
	add("source_version", l.srcVersion)
	add("source_cluster", l.srcCluster)
	add("destination_service", l.dstService)
	add("destination_service_namespace", l.dstServiceNamespace)
	add("destination_service_name", l.dstServiceName)
	add("destination_workload", l.dstWorkload)
	add("destination_canonical_service", l.dstCanonical)
	add("destination_canonical_revision", l.dstRevision)
	add("destination_workload_namespace", l.dstNamespace)
	add("destination_principal", l.dstPrincipal)
	add("destination_app", l.dstApp)
	add("destination_version", l.dstVersion)
	add("destination_cluster", l.dstCluster)
	add("request_protocol", "tcp")
	add("response_flags", l.flags)
	add("connection_security_policy", l.security)
	if l.located {
		add("source_region", l.srcRegion)
		add("source_zone", l.srcZone)
		add("destination_region", l.dstRegion)
		add("destination_zone", l.dstZone)
	}
	return out
}

// series is one label set with its counters.
type series struct {
	key                                    labels
	pairs                                  []*dto.LabelPair
	opened, closed, failed, sent, received atomic.Uint64
	refs                                   int // guarded by metrics.mu
	used                                   time.Time
	srcUID, dstUID                         string
}

type denial struct{ reason, policy string }

type failureKey struct {
	direction Direction
	reason    Reason
}

type dryResult struct {
	direction Direction
	result    string
}

// metrics is the collector. It keeps its own series, because client_golang's
// vectors neither expire them nor let label sets differ within a family.
type metrics struct {
	t                     *Table
	inOpen, outOpen       atomic.Int64
	inDecided, outDecided latencies
	overflowed            atomic.Uint64

	mu      sync.Mutex
	byKey   map[labels]*series
	denials map[denial]uint64
	earlies map[failureKey]uint64
	fails   map[failureKey]uint64
	dryRuns map[dryResult]uint64
}

func newMetrics(t *Table) *metrics {
	return &metrics{t: t, byKey: map[labels]*series{}, denials: map[denial]uint64{}, earlies: map[failureKey]uint64{}, fails: map[failureKey]uint64{}, dryRuns: map[dryResult]uint64{}}
}

func (m *metrics) socketsOpen(d Direction) *atomic.Int64 {
	if d == Inbound {
		return &m.inOpen
	}
	return &m.outOpen
}

// acquire finds or makes the series of a record and holds it.
func (m *metrics) acquire(r *Record, f Flag) *series {
	k := labelsOf(r, f)
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.byKey[k]
	if s == nil && len(m.byKey) >= m.t.cfg.MaxSeries {
		m.overflowed.Add(1)
		k = labels{reporter: r.Direction.reporter(), flags: string(f)}
		s = m.byKey[k]
	}
	if s == nil {
		s = &series{key: k, pairs: k.pairs()}
		m.byKey[k] = s
	}
	s.refs++
	if r.Src != nil {
		s.srcUID = r.Src.UID
	}
	if r.Dst != nil {
		s.dstUID = r.Dst.UID
	}
	return s
}

func (m *metrics) release(s *series, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s.refs--
	s.used = now
}

// end counts the close. Opened was counted with flag "-", so bytes stay there
// and the close goes where the final flag says, as the reference does.
func (m *metrics) end(c *Conn, f Flag, failed bool) {
	now := time.Now()
	s := c.series.Load()
	c.flush()
	final := s
	if f != FlagNone {
		final = m.acquire(&c.rec, f)
	}
	final.closed.Add(1)
	if failed {
		final.failed.Add(1)
	}
	if final != s {
		m.release(final, now)
	}
	m.release(s, now)
	m.socketsOpen(c.rec.Direction).Add(-1)
}

// flush moves bytes counted since the last flush into the series. Scrapes call
// it too, so a long connection shows before it ends.
func (c *Conn) flush() {
	s := c.series.Load()
	if s == nil {
		return
	}
	// received is what came from the client, sent what went to it.
	move(&s.received, &c.flushed.received, c.Stats.Sent.Load())
	move(&s.sent, &c.flushed.sent, c.Stats.Received.Load())
}

func move(to, flushed *atomic.Uint64, now uint64) {
	for {
		was := flushed.Load()
		if now <= was {
			return
		}
		if flushed.CompareAndSwap(was, now) {
			to.Add(now - was)
			return
		}
	}
}

func (m *metrics) denied(e *DenyError) {
	d := denial{reason: "policy", policy: e.Verdict.Policy}
	if e.Live {
		d.reason = "policy_change"
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.denials[d]; !ok && len(m.denials) >= maxDenied {
		d.policy = "other"
	}
	m.denials[d]++
}

// failure counts every failed connection, early or not.
func (m *metrics) failure(dir Direction, r Reason) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fails[failureKey{dir, r}]++
}

func (m *metrics) early(dir Direction, r Reason) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.earlies[failureKey{dir, r}]++
}

// dryRun counts what a policy in dry run would have done.
func (m *metrics) dryRun(dir Direction, result string) {
	d := dryResult{dir, result}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.dryRuns[d]; !ok && len(m.dryRuns) >= maxDenied {
		d.result = "other"
	}
	m.dryRuns[d]++
}

// retire removes series that nobody uses: those whose workloads are gone, those
// that name no workload (the address is all that is known of it), and, while
// there are many, those that have long been idle, before new ones would have to
// go without labels.
func (m *metrics) retire(snap *mesh.Snapshot, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	crowded := len(m.byKey) > m.t.cfg.MaxSeries/4*3
	for k, s := range m.byKey {
		idle := now.Sub(s.used)
		if s.refs > 0 || idle < m.t.cfg.SeriesDelay {
			continue
		}
		nameless := s.srcUID == "" && s.dstUID == ""
		if nameless || gone(snap, s.srcUID) || gone(snap, s.dstUID) || crowded && idle > crowdedDelay*m.t.cfg.SeriesDelay {
			delete(m.byKey, k)
		}
	}
}

// crowdedDelay times Config.SeriesDelay is how long a series may be idle while
// there are many: an hour, with the default.
const crowdedDelay = 12

func gone(snap *mesh.Snapshot, uid string) bool { return uid != "" && snap.Workload(uid) == nil }
