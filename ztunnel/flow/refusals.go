package flow

import (
	"cmp"
	"container/list"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/cert"
)

// Bounds of the memory of refusals. A peer chooses addresses and authorities,
// so it can make keys at will: past a pod's bound, and past the node's, keys
// that are not yet known are counted together under "(others)" for as long as
// the known ones are still being met. So neither the memory nor the log grows
// with what peers invent, and one pod's refusals do not push out another's.
const (
	maxGroups    = 1024
	maxPodGroups = 64
	maxName      = 256 // bytes of a source or destination
	maxError     = 512 // bytes of an example's error
	others       = "(others)"
)

// groupKey is what makes two refusals the same one.
type groupKey struct {
	pod      string
	dir      Direction
	reason   Reason
	why      string // the policy, or the certificate and its fault
	src, dst string
}

// group counts one sort of refusal and holds back its lines.
type group struct {
	key         groupKey
	at          *list.Element // in its pod's list
	count       uint64
	first, last time.Time
	example     example

	logged time.Time // when its latest line was written
	held   uint64    // ends since then that have no line
	moved  moved     // by those
	latest *Conn     // of those
	how    outcome   // it ended
}

type example struct {
	trace    Trace
	src, dst netip.AddrPort
	identity string
	text     string
}

// podGroups is one pod's groups, the most recent first.
type podGroups struct {
	groups list.List
	normal int // without those of others
}

// refusals remembers the groups. Any goroutine may use it; it logs nothing
// itself but returns what is to be logged.
type refusals struct {
	interval time.Duration

	mu    sync.Mutex
	byKey map[groupKey]*group
	pods  map[string]*podGroups
}

func newRefusals(interval time.Duration) *refusals {
	return &refusals{interval: interval, byKey: map[groupKey]*group{}, pods: map[string]*podGroups{}}
}

// sum is a line for count ends, of which conn was the latest.
type sum struct {
	conn  *Conn
	how   outcome
	count uint64
	moved moved
}

// moved is what connections have carried, seen from the client.
type moved struct{ sent, received uint64 }

func (c *Conn) moved() moved {
	if !c.opened {
		return moved{}
	}
	return moved{c.Stats.Received.Load(), c.Stats.Sent.Load()}
}

// add counts an end and returns the lines to write now: its own, if it is the
// first for an interval, and those held back by a group that made room.
func (r *refusals) add(c *Conn, o outcome, now time.Time) (lines []sum) {
	k := keyOf(c, o)
	logged := c.rec.logs(true)
	r.mu.Lock()
	defer r.mu.Unlock()
	g, left := r.placeLocked(k, now)
	if left != nil && left.held > 0 {
		lines = append(lines, left.take(now))
	}
	if g.count == 0 {
		g.first = now
	}
	g.count++
	g.last = now
	switch {
	case !logged:
		g.example = exampleOf(c, o)
	case g.held == 0 && (g.logged.IsZero() || now.Sub(g.logged) >= r.interval):
		g.logged, g.example = now, exampleOf(c, o)
		lines = append(lines, sum{c, o, 1, c.moved()})
	default:
		g.held++
		m := c.moved()
		g.moved.sent += m.sent
		g.moved.received += m.received
		g.latest, g.how = c, o
	}
	return lines
}

// exampleOf shows one connection of a group: the latest that has a line in the
// log, where there is one, so that its trace id is found there.
func exampleOf(c *Conn, o outcome) example {
	return example{c.trace, c.rec.SrcAddr, c.rec.DstAddr, c.rec.srcIdentity(), clip(o.err.Error(), maxError)}
}

// take is the line for what was held back.
func (g *group) take(now time.Time) sum {
	g.example = exampleOf(g.latest, g.how)
	s := sum{g.latest, g.how, g.held, g.moved}
	g.held, g.moved, g.latest, g.how, g.logged = 0, moved{}, nil, outcome{}, now
	return s
}

// due returns the lines that an interval has gathered.
func (r *refusals) due(now time.Time) (lines []sum) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range r.byKey {
		if g.held > 0 {
			lines = append(lines, g.take(now))
		}
	}
	return lines
}

// placeLocked finds or makes the group of a key, perhaps in another's place.
func (r *refusals) placeLocked(k groupKey, now time.Time) (g, left *group) {
	if g := r.foundLocked(k); g != nil {
		return g, nil
	}
	if p := r.pods[k.pod]; p != nil && p.normal >= maxPodGroups {
		if left = p.oldest(); now.Sub(left.last) < r.interval {
			left, k.why, k.src, k.dst = nil, "", others, others
			if g := r.foundLocked(k); g != nil {
				return g, nil
			}
		} else {
			r.dropLocked(left)
		}
	}
	if left == nil && len(r.byKey) >= maxGroups { // a group that left made room already
		if left = r.oldestLocked(); now.Sub(left.last) < r.interval {
			left, k = nil, groupKey{dir: k.dir, reason: k.reason, src: others, dst: others}
			if g := r.foundLocked(k); g != nil {
				return g, nil
			}
		} else {
			r.dropLocked(left)
		}
	}
	g = &group{key: k}
	p := r.pods[k.pod]
	if p == nil {
		p = &podGroups{}
		r.pods[k.pod] = p
	}
	if k.src != others {
		p.normal++
	}
	g.at = p.groups.PushFront(g)
	r.byKey[k] = g
	return g, left
}

func (r *refusals) foundLocked(k groupKey) *group {
	g := r.byKey[k]
	if g != nil {
		r.pods[k.pod].groups.MoveToFront(g.at)
	}
	return g
}

func (r *refusals) dropLocked(g *group) {
	p := r.pods[g.key.pod]
	p.groups.Remove(g.at)
	if g.key.src != others {
		p.normal--
	}
	if p.groups.Len() == 0 {
		delete(r.pods, g.key.pod)
	}
	delete(r.byKey, g.key)
}

// oldest is the pod's group that was met longest ago, not counting others.
func (p *podGroups) oldest() *group {
	for e := p.groups.Back(); e != nil; e = e.Prev() {
		if g := e.Value.(*group); g.key.src != others {
			return g
		}
	}
	panic("BUG: a pod at its bound of groups has none")
}

func (r *refusals) oldestLocked() (oldest *group) {
	for _, p := range r.pods {
		if g := p.groups.Back().Value.(*group); oldest == nil || g.last.Before(oldest.last) {
			oldest = g
		}
	}
	return oldest
}

func keyOf(c *Conn, o outcome) groupKey {
	r := &c.rec
	return groupKey{pod: r.Pod, dir: r.Direction, reason: o.reason, why: clip(whyOf(o.err), maxName),
		src: clip(r.source(), maxName), dst: clip(r.destination(), maxName)}
}

// whyOf is what of an error tells apart causes of one reason. Errors as a whole
// do not: they name ports.
func whyOf(err error) string {
	if d, ok := errors.AsType[*DenyError](err); ok {
		return d.Why()
	}
	if v, ok := errors.AsType[*cert.VerifyError](err); ok {
		return v.Error()
	}
	return ""
}

// source is who asked: the workload, else the identity, else the address.
func (r *Record) source() string {
	switch {
	case r.Src != nil && r.Src.WorkloadName != "":
		return r.Src.Namespace + "/" + r.Src.WorkloadName
	case r.Src != nil:
		return r.Src.Namespace + "/" + r.Src.Name
	case !r.SrcID.IsZero():
		return r.SrcID.String()
	case r.SrcAddr.IsValid():
		return r.SrcAddr.Addr().String()
	}
	return unknown
}

func (r *Record) srcIdentity() string {
	if r.SrcID.IsZero() {
		return ""
	}
	return r.SrcID.String()
}

// destination is what was asked for: the service, else the workload, each with
// the port, else the address.
func (r *Record) destination() string {
	name, port := r.Service, r.DstAddr.Port()
	if r.HBONEAddr != "" {
		ap, err := netip.ParseAddrPort(r.HBONEAddr)
		if err != nil {
			return r.HBONEAddr
		}
		port = ap.Port()
	}
	if name == "" && r.Dst != nil {
		name = r.Dst.Namespace + "/" + cmp.Or(r.Dst.WorkloadName, r.Dst.Name)
	}
	switch {
	case name != "" && port != 0:
		return name + ":" + strconv.Itoa(int(port))
	case name != "":
		return name
	case r.HBONEAddr != "":
		return r.HBONEAddr
	case r.DstAddr.IsValid():
		return r.DstAddr.String()
	}
	return unknown
}

// clip bounds a string that a peer may have chosen.
func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}

// Refusal is one row of the admin page.
type Refusal struct {
	Reason      Reason    `json:"reason"`
	Why         string    `json:"why,omitempty"`
	Direction   Direction `json:"direction"`
	Pod         string    `json:"pod,omitempty"`
	Source      string    `json:"source"`
	Destination string    `json:"destination"`
	Count       uint64    `json:"count"`
	First       time.Time `json:"first"`
	Last        time.Time `json:"last"`
	Example     Example   `json:"example"`
}

// Example is the latest connection of a row.
type Example struct {
	TraceID     string `json:"traceId,omitempty"`
	Source      string `json:"source,omitempty"`
	Identity    string `json:"identity,omitempty"`
	Destination string `json:"destination,omitempty"`
	Error       string `json:"error"`
}

// Refusals are the latest ones, the most recent first.
func (t *Table) Refusals() []Refusal {
	r := t.refusals
	out := []Refusal{}
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, g := range r.byKey {
		if k.reason == ReasonReset {
			continue // held for the sake of the log only
		}
		out = append(out, Refusal{Reason: k.reason, Why: k.why, Direction: k.dir, Pod: k.pod, Source: k.src, Destination: k.dst,
			Count: g.count, First: g.first.UTC(), Last: g.last.UTC(),
			Example: Example{TraceID: g.example.trace.String(), Source: addrString(g.example.src), Identity: g.example.identity,
				Destination: addrString(g.example.dst), Error: g.example.text}})
	}
	slices.SortFunc(out, func(a, b Refusal) int {
		return cmp.Or(b.Last.Compare(a.Last), cmp.Compare(a.Source, b.Source), cmp.Compare(a.Destination, b.Destination), cmp.Compare(a.Reason, b.Reason), cmp.Compare(a.Why, b.Why))
	})
	return out
}

func addrString(ap netip.AddrPort) string {
	if !ap.IsValid() {
		return ""
	}
	return ap.String()
}

// WriteRefusals writes rows as an aligned table. Sources, destinations and
// errors are quoted where a peer could have put control characters into them.
func WriteRefusals(w io.Writer, rows []Refusal) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "COUNT\tREASON\tDIRECTION\tSOURCE\tDESTINATION\tFIRST\tLAST\tTRACE ID\tEXAMPLE")
	for _, r := range rows {
		fmt.Fprintf(tw, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Count, r.Reason, r.Direction, printable(r.Source), printable(r.Destination),
			r.First.Format(time.RFC3339), r.Last.Format(time.RFC3339), r.Example.TraceID, printable(r.Example.Error))
	}
	return tw.Flush()
}

// printable is s, quoted unless all of it can be shown.
func printable(s string) string {
	for _, c := range s {
		if !strconv.IsPrint(c) {
			return strconv.Quote(s)
		}
	}
	return s
}
