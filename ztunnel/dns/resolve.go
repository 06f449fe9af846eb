package dns

import (
	"bytes"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

// DefaultDomain is the cluster's domain unless CLUSTER_DOMAIN says otherwise.
const DefaultDomain = "cluster.local"

// Resolver knows which names are the mesh's. It is immutable.
type Resolver struct {
	domain    string // "cluster.local"
	svc       string // "svc.cluster.local"
	dotSvc    string // ".svc.cluster.local"
	dotDomain string // ".cluster.local"
	preferred string
	ipv6      bool
}

// ResolverConfig of a Resolver.
type ResolverConfig struct {
	Domain    string // default DefaultDomain
	Preferred string // a namespace whose services win over others' (deprecated upstream)
	NoIPv6    bool   // AAAA of the mesh's names have no answer
}

// NewResolver returns a resolver.
func NewResolver(c ResolverConfig) *Resolver {
	d := strings.ToLower(strings.Trim(c.Domain, "."))
	if d == "" {
		d = DefaultDomain
	}
	return &Resolver{domain: d, svc: "svc." + d, dotSvc: ".svc." + d, dotDomain: "." + d, preferred: c.Preferred, ipv6: !c.NoIPv6}
}

// Client is who asks.
type Client struct {
	Namespace, Network string
	search             [3]string // as in a pod's resolv.conf
	more               []string  // as in this host's
}

// Searching is c with further search domains, for a client whose resolv.conf is
// known: that of the host that this process serves.
func (c Client) Searching(domains []string) Client {
	c.more = nil
	for _, d := range domains {
		if d = strings.ToLower(strings.Trim(d, ".")); d != "" && !slices.Contains(c.search[:], d) {
			c.more = append(c.more, d)
		}
	}
	return c
}

// Client describes a pod: what it sees depends on its namespace and network.
// Its search list is the one Kubernetes writes; another one in its resolv.conf
// only costs queries, since nobody can read it from here.
func (r *Resolver) Client(namespace, network string) Client {
	return Client{Namespace: namespace, Network: network, search: [3]string{namespace + r.dotSvc, r.svc, r.domain}}
}

// answer is what the mesh says to a question. Its slices are reused.
type answer struct {
	owned   bool
	cluster bool   // the name is under the cluster's domain
	cname   []byte // what the question's name is an alias of; nil: nothing
	addrs   []netip.Addr
	targets []target
	scratch [3 * maxName]byte
	owner   [maxName]byte
}

// target is one SRV record.
type target struct {
	host string     // empty: made of addr and the service
	addr netip.Addr // of an endpoint; not valid for a service with VIPs
	svc  string
	port uint16
}

// query is one question as the resolver sees it.
type query struct {
	name   []byte // lower case
	labels int
	qtype  dnsmessage.Type
	max    int    // addresses that can be of use
	rnd    uint64 // decides the order
}

// resolve answers from a snapshot. It does not allocate once the answer's slices
// have grown.
func (r *Resolver) resolve(s *mesh.Snapshot, c *Client, q query, a *answer) {
	a.owned, a.cluster, a.cname, a.addrs, a.targets = false, false, nil, a.addrs[:0], a.targets[:0]
	l := lookup{Resolver: r, s: s, c: c, q: q, a: a}
	if q.qtype == dnsmessage.TypeSRV {
		l.resolveSRV()
		return
	}
	h, ok := l.find(q.name, q.labels)
	if !ok {
		return
	}
	a.owned, a.cluster, a.cname = true, h.cluster, h.cname
	l.addresses(h)
	shuffle(a.addrs, &l.q.rnd)
}

// lookup is one resolution under way.
type lookup struct {
	*Resolver
	s *mesh.Snapshot
	c *Client
	q query
	a *answer
}

// hit is what a name means: a service, or single workloads of it.
type hit struct {
	svc     *mesh.Service
	pods    []*mesh.Workload
	one     *mesh.Workload
	cluster bool
	cname   []byte
}

// find goes through what a name can stand for: the name, its Kubernetes
// completions, and the same without each search domain.
func (l *lookup) find(name []byte, labels int) (hit, bool) {
	if h, ok := l.complete(name, labels); ok {
		return h, true
	}
	for _, search := range l.c.search {
		if h, ok := l.without(name, search); ok {
			return h, true
		}
	}
	for _, search := range l.c.more {
		if h, ok := l.without(name, search); ok {
			return h, true
		}
	}
	return hit{}, false
}

// without looks up a name to which the client's resolver added a search domain.
func (l *lookup) without(name []byte, search string) (hit, bool) {
	n := len(name) - len(search) - 1
	if n <= 0 || name[n] != '.' || string(name[n+1:]) != search {
		return hit{}, false
	}
	stripped := name[:n]
	h, ok := l.complete(stripped, 1+bytes.Count(stripped, dot))
	if ok && !h.wildcard() {
		h.cname = stripped
	}
	return h, ok
}

var dot = []byte{'.'}

func (h *hit) wildcard() bool { return h.svc != nil && h.svc.Host.Name[0] == '*' }

// complete tries a name and what Kubernetes' short names of as many labels stand
// for: "web", "web.shop", "web.shop.svc", and the same of a pod of a service.
func (l *lookup) complete(name []byte, labels int) (hit, bool) {
	if h, ok := l.exactOrWild(name, ""); ok {
		return h, true
	}
	endsInSvc := bytes.HasSuffix(name, dotSvcLabel)
	var ends [2]string
	switch {
	case labels == 1:
		ends[0] = l.c.search[0]
	case labels == 2:
		ends[0], ends[1] = l.svc, l.c.search[0]
	case labels == 3:
		if endsInSvc {
			ends[0] = l.domain
		}
		ends[1] = l.svc
	case labels == 4 && endsInSvc:
		ends[0] = l.domain
	}
	for _, end := range ends {
		if end == "" {
			continue
		}
		if h, ok := l.exactOrWild(name, end); ok {
			return h, true
		}
	}
	return hit{}, false
}

var dotSvcLabel = []byte(".svc")

// exactOrWild looks up name, completed by end, and then its wildcards, the
// longest first.
func (l *lookup) exactOrWild(name []byte, end string) (hit, bool) {
	if len(name)+1+len(end) > maxName {
		return hit{}, false
	}
	full := append(l.a.scratch[:0], name...)
	if end != "" {
		full = append(append(full, '.'), end...)
	}
	o := l.ownerOf(full)
	if h, ok := l.exact(full, o); ok {
		return h, true
	}
	for i := 1; i < len(full); i++ {
		if full[i] != '.' {
			continue
		}
		full[i-1] = '*' // what is before the dot is not needed again
		if svc := l.choose(l.s.ServicesByHostname(view(full[i-1:])), o); svc != nil {
			return hit{svc: svc}, true
		}
	}
	return hit{}, false
}

// owner is who may give a name under the cluster's domain a meaning for others.
// Anybody may write a ServiceEntry, and a client's search domains turn every name
// it asks for into one under its own namespace first: without owners
// "*.cluster.local", or "web.shop.svc.cluster.local.bank.svc.cluster.local",
// would take other namespaces' services away from their clients.
type owner struct {
	domain bool   // the name is under the cluster's domain
	svc    bool   // and there among the services
	ns     string // of which namespace; empty: of none
}

// ownerOf reads the namespace of "name.namespace.svc.cluster.local" and of
// "pod.name.namespace.svc.cluster.local". What has more labels is no name of
// Kubernetes. The namespace is a copy, good until the next call.
func (l *lookup) ownerOf(name []byte) owner {
	o := owner{domain: strings.HasSuffix(view(name), l.dotDomain)}
	var rest string
	if rest, o.svc = strings.CutSuffix(view(name), l.dotSvc); !o.svc {
		return o
	}
	if i := strings.LastIndexByte(rest, '.'); i >= 0 && strings.Count(rest[:i], ".") <= 1 {
		o.ns = view(append(l.a.owner[:0], rest[i+1:]...))
	}
	return o
}

// mayAnswer reports whether a service may give a name with such an owner a
// meaning. In its own namespace a client gets what that declares.
func (l *lookup) mayAnswer(s *mesh.Service, o owner) bool {
	switch {
	case !o.domain || s.Namespace == l.c.Namespace:
		return true
	case o.svc:
		return s.Namespace == o.ns && strings.HasSuffix(s.Host.Name, l.dotSvc)
	}
	return s.Host.Name[0] != '*'
}

// view is b as a string while b does not change. Lookups keep no key.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

func (l *lookup) exact(name []byte, o owner) (hit, bool) {
	cluster := strings.HasSuffix(view(name), l.dotSvc)
	if svc := l.choose(l.s.ServicesByHostname(view(name)), o); svc != nil {
		return hit{svc: svc, cluster: cluster}, true
	}
	i := bytes.IndexByte(name, '.')
	if i < 0 {
		return hit{}, false
	}
	parents := l.s.ServicesByHostname(view(name[i+1:]))
	pods := l.s.WorkloadsByDNSName(view(name))
	if len(pods) == 0 && (len(parents) == 0 || !cluster) {
		return hit{}, false
	}
	parent := l.choose(parents, o)
	switch {
	case parent == nil && len(parents) > 0:
		return hit{}, false // of a service that this client must not see
	case len(pods) > 0:
		return hit{svc: parent, pods: pods, cluster: cluster}, true
	case !headless(parent):
		return hit{}, false
	}
	addr, ok := dashed(name[:i])
	if !ok {
		return hit{}, false
	}
	w := l.s.WorkloadByAddr(l.c.Network, addr)
	if w == nil || !l.s.Endpoints(parent.Host).Contains(w.UID) {
		return hit{}, false
	}
	return hit{svc: parent, one: w, cluster: cluster}, true
}

// dashed reads an address as Kubernetes writes it into a label: "10-0-0-1",
// "fd00-0-0-0-0-0-0-1".
func dashed(label []byte) (netip.Addr, bool) {
	dashes := bytes.Count(label, []byte{'-'})
	if dashes != 3 && dashes != 7 || len(label) > len("ffff-ffff-ffff-ffff-ffff-ffff-ffff-ffff") {
		return netip.Addr{}, false
	}
	with := byte('.')
	if dashes == 7 {
		with = ':'
	}
	var buf [40]byte
	b := append(buf[:0], label...)
	for i := range b {
		if b[i] == '-' {
			b[i] = with
		}
	}
	a, err := netip.ParseAddr(string(b))
	return a, err == nil
}

func headless(s *mesh.Service) bool { return len(s.VIPs) == 0 && len(s.CIDRs) == 0 }

// choose picks among the services of one host name: those that have an answer
// and that the client may see; its own namespace's, a canonical one, the
// preferred namespace's, the first seen.
func (l *lookup) choose(list []*mesh.Service, o owner) *mesh.Service {
	var best *mesh.Service
	bestRank := -1
	for _, s := range list {
		if len(s.VIPs) == 0 && !strings.HasSuffix(s.Host.Name, l.dotSvc) || !s.VisibleTo(l.c.Namespace) || !l.mayAnswer(s, o) {
			continue
		}
		rank := 0
		switch {
		case s.Namespace == l.c.Namespace:
			rank = 3
		case s.Canonical:
			rank = 2
		case l.preferred != "" && s.Namespace == l.preferred:
			rank = 1
		}
		if rank > bestRank {
			best, bestRank = s, rank
		}
	}
	return best
}

// addresses collects what the question's type wants.
func (l *lookup) addresses(h hit) {
	switch {
	case h.one != nil:
		l.addWorkload(h.svc, h.one)
	case h.pods != nil:
		for _, w := range h.pods {
			l.addWorkload(h.svc, w)
		}
	case !headless(h.svc):
		for _, v := range h.svc.VIPs {
			if v.Network == l.c.Network {
				l.add(h.svc, v.Addr)
			}
		}
	default:
		l.eachEndpoint(h.svc, func(e mesh.Endpoint) bool {
			l.addWorkload(h.svc, e.Workload)
			return len(l.a.addrs) < l.q.max
		})
	}
}

// eachEndpoint walks the endpoints of a headless service from a random one on,
// so that an answer cut short does not always name the same ones.
func (l *lookup) eachEndpoint(s *mesh.Service, f func(mesh.Endpoint) bool) {
	set := l.s.Endpoints(s.Host)
	n := set.Len()
	if n == 0 {
		return
	}
	start := int(below(&l.q.rnd, uint64(n)))
	for i := range n {
		if !f(set.At((start + i) % n)) {
			return
		}
	}
}

func (l *lookup) usable(s *mesh.Service, w *mesh.Workload) bool {
	return w.Network == l.c.Network && (w.Healthy || s != nil && s.AllowUnhealthy)
}

func (l *lookup) addWorkload(s *mesh.Service, w *mesh.Workload) {
	if !l.usable(s, w) {
		return
	}
	for _, a := range w.Addrs {
		before := len(l.a.addrs)
		l.add(s, a)
		if len(l.a.addrs) > before {
			return // one per endpoint and family
		}
	}
}

func (l *lookup) add(s *mesh.Service, a netip.Addr) {
	wanted := l.q.qtype == dnsmessage.TypeALL ||
		a.Is4() && l.q.qtype == dnsmessage.TypeA || !a.Is4() && l.q.qtype == dnsmessage.TypeAAAA
	if !wanted || !l.family(s, a) || len(l.a.addrs) >= l.q.max {
		return
	}
	// Pods on the node's network share its address.
	recent := l.a.addrs[max(0, len(l.a.addrs)-64):] // all of a usual answer; keeps a huge one linear
	for _, have := range recent {
		if have == a {
			return
		}
	}
	l.a.addrs = append(l.a.addrs, a)
}

// family reports whether a service serves an address's family.
func (l *lookup) family(s *mesh.Service, a netip.Addr) bool {
	if !a.Is4() && !l.ipv6 {
		return false
	}
	if s == nil {
		return true
	}
	switch s.Families {
	case workload.IPFamilies_IPV4_ONLY:
		return a.Is4()
	case workload.IPFamilies_IPV6_ONLY:
		return !a.Is4()
	}
	return true
}

// below draws a number in [0, n) (splitmix64).
func below(rnd *uint64, n uint64) uint64 {
	*rnd += 0x9e3779b97f4a7c15
	z := *rnd
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	hi, _ := bits.Mul64(z^z>>31, n)
	return hi
}

func shuffle(a []netip.Addr, rnd *uint64) {
	for i := len(a) - 1; i > 0; i-- {
		j := below(rnd, uint64(i+1))
		a[i], a[j] = a[j], a[i]
	}
}
