package delta

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
)

const (
	policy   = "type.test/policy"
	workload = "type.test/workload"
)

func up(typ, name, content string, aliases ...string) Upsert {
	return Upsert{Type: typ, Name: name, Aliases: aliases, Message: wrapperspb.String(content)}
}

// testStream is a client in lock step with its server.
type testStream struct {
	t      *testing.T
	store  *Store
	stream *Stream
}

func newTestStream(t *testing.T, s *Store, l Limits) *testStream {
	return &testStream{t, s, s.NewStream(l)}
}

func (c *testStream) apply(ups []Upsert, rms ...Removal) {
	c.t.Helper()
	if _, err := c.store.Apply(ups, rms); err != nil {
		c.t.Fatal(err)
	}
}

func (c *testStream) request(req *discovery.DeltaDiscoveryRequest) Event {
	c.t.Helper()
	ev, err := c.stream.Request(req)
	if err != nil {
		c.t.Fatal(err)
	}
	return ev
}

// want takes the next response, acknowledges it and compares it with
// "type +a +b -c" ("" for none).
func (c *testStream) want(want string) *discovery.DeltaDiscoveryResponse {
	c.t.Helper()
	resp := c.wantUnacked(want)
	if resp != nil {
		c.request(&discovery.DeltaDiscoveryRequest{TypeUrl: resp.TypeUrl, ResponseNonce: resp.Nonce})
	}
	return resp
}

func (c *testStream) wantUnacked(want string) *discovery.DeltaDiscoveryResponse {
	c.t.Helper()
	resp, err := c.stream.Next()
	if err != nil {
		c.t.Fatal(err)
	}
	if diff := cmp.Diff(want, show(resp)); diff != "" {
		c.t.Fatalf("next response (-want +got):\n%s", diff)
	}
	return resp
}

func show(r *discovery.DeltaDiscoveryResponse) string {
	if r == nil {
		return ""
	}
	s := r.TypeUrl[strings.LastIndexByte(r.TypeUrl, '/')+1:]
	for _, res := range r.Resources {
		s += " +" + res.Name
	}
	for _, n := range r.RemovedResources {
		s += " -" + n
	}
	return s
}

func sub(typ string, names ...string) *discovery.DeltaDiscoveryRequest {
	return &discovery.DeltaDiscoveryRequest{TypeUrl: typ, ResourceNamesSubscribe: names}
}

func TestAClientTooFarBehindMustResume(t *testing.T) {
	c := newTestStream(t, NewStore(workload), Limits{})
	c.request(sub(workload))
	c.want("workload")
	for i := range maxRemovals + 1 {
		name := fmt.Sprint(i)
		c.apply([]Upsert{up(workload, name, "1")})
		c.apply(nil, Removal{workload, name})
	}
	if _, err := c.stream.Next(); err != ErrBehind {
		t.Fatalf("got %v, want ErrBehind", err)
	}
	if n := len(c.store.tables[workload].gone); n > maxRemovals {
		t.Fatalf("%d removals remembered, at most %d are allowed", n, maxRemovals)
	}
}

// A service that gets the address it was asked for by brings the workloads that
// were there before it, which nothing changed.
func TestLateAliasBringsWhatIsReachedThroughIt(t *testing.T) {
	c := newTestStream(t, NewStore(workload), Limits{})
	pod := up(workload, "pod", "1")
	pod.Via = []string{"ns/svc"}
	c.apply([]Upsert{up(workload, "ns/svc", "1"), pod})
	c.request(&discovery.DeltaDiscoveryRequest{TypeUrl: workload, ResourceNamesSubscribe: []string{"*"}, ResourceNamesUnsubscribe: []string{"*"}})
	c.want("workload")
	c.request(sub(workload, "net/10.9.9.9"))
	c.want("workload -net/10.9.9.9")
	c.apply([]Upsert{up(workload, "ns/svc", "2", "net/10.9.9.9")})
	c.want("workload +ns/svc")
	c.want("workload +pod")
	c.want("")
}

// A resource that was sent and then is again what the client had when it
// resumed, before the rest of the first answers went out, is sent again.
func TestBackToTheVersionOfTheResume(t *testing.T) {
	c := newTestStream(t, NewStore(workload), Limits{FirstBytes: 1, Bytes: 1})
	c.apply([]Upsert{up(workload, "a", "1")})
	had := c.store.Resources(workload)[0].Version
	c.apply([]Upsert{up(workload, "a", "2"), up(workload, "b", "1"), up(workload, "c", "1")})
	c.request(&discovery.DeltaDiscoveryRequest{TypeUrl: workload, InitialResourceVersions: map[string]string{"a": had}})
	c.want("workload +a")
	c.apply([]Upsert{up(workload, "a", "1")})
	c.want("workload +b")
	c.want("workload +c")
	c.want("workload +a")
	c.want("")
}

func TestLimits(t *testing.T) {
	s := NewStore(workload)
	tests := []struct {
		name string
		reqs []*discovery.DeltaDiscoveryRequest
	}{
		{"no type", []*discovery.DeltaDiscoveryRequest{{}}},
		{"types", []*discovery.DeltaDiscoveryRequest{sub("a"), sub("b"), sub("c")}},
		{"names at first", []*discovery.DeltaDiscoveryRequest{sub(workload, "a", "b", "c", "d")}},
		{"names later", []*discovery.DeltaDiscoveryRequest{sub(workload, "a"), sub(workload, "b", "c", "d")}},
		{"the same name again and again", []*discovery.DeltaDiscoveryRequest{sub(workload), sub(workload, "a", "a", "a", "a")}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			st := s.NewStream(Limits{Types: 2, Names: 3})
			var err error
			for _, r := range tt.reqs {
				_, err = st.Request(r)
			}
			if _, ok := err.(*RequestError); !ok {
				t.Fatalf("got %v, want a *RequestError", err)
			}
		})
	}
}

// model is a client that checks the order's promise at each step.
type model struct {
	policies  map[string]string // name → version
	workloads map[string]string
	refs      map[string]string // workload → policy
	queue     []*discovery.DeltaDiscoveryResponse
}

func (m *model) take(t *testing.T, r *discovery.DeltaDiscoveryResponse) {
	t.Helper()
	held := m.workloads
	if r.TypeUrl == policy {
		held = m.policies
	}
	for _, n := range r.RemovedResources {
		delete(held, n)
		if r.TypeUrl == workload {
			delete(m.refs, n)
		}
	}
	for _, res := range r.Resources {
		if held[res.Name] == res.Version {
			t.Fatalf("%s sent again unchanged", res.Name)
		}
		held[res.Name] = res.Version
		if r.TypeUrl == workload {
			var v wrapperspb.StringValue
			if err := res.Resource.UnmarshalTo(&v); err == nil {
				m.refs[res.Name], _, _ = strings.Cut(v.Value, "/")
			}
		}
	}
	for w, p := range m.refs {
		if p != "" && m.policies[p] == "" {
			t.Fatalf("workload %s names policy %s, which the client does not have", w, p)
		}
	}
}

// TestRandomChangesReachEveryClientInOrder interleaves changes, sends, late
// acknowledgements and reconnects, and compares what the client has with the
// store in the end.
func TestRandomChangesReachEveryClientInOrder(t *testing.T) {
	for seed := range uint64(60) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		s := NewStore(policy, workload)
		m := &model{policies: map[string]string{}, workloads: map[string]string{}, refs: map[string]string{}}
		st := resume(t, s, m)
		refs := map[string]string{} // the truth
		for step := range 400 {
			switch rnd.IntN(6) {
			case 0, 1:
				mutate(t, s, rnd, refs, step)
			case 2, 3:
				resp, err := st.Next()
				if err != nil {
					t.Fatal(err)
				}
				if resp != nil {
					m.queue = append(m.queue, resp)
				}
			case 4:
				if len(m.queue) > 0 {
					ack(t, st, m)
				}
			case 5:
				if rnd.IntN(15) == 0 {
					m.queue = nil // lost with the connection
					st = resume(t, s, m)
				}
			}
		}
		for {
			resp, err := st.Next()
			if err != nil {
				t.Fatal(err)
			}
			if resp != nil {
				m.queue = append(m.queue, resp)
			} else if len(m.queue) == 0 {
				break
			}
			for len(m.queue) > 0 {
				ack(t, st, m)
			}
		}
		if diff := cmp.Diff(current(s, policy), m.policies); diff != "" {
			t.Fatalf("seed %d: policies (-store +client):\n%s", seed, diff)
		}
		if diff := cmp.Diff(current(s, workload), m.workloads); diff != "" {
			t.Fatalf("seed %d: workloads (-store +client):\n%s", seed, diff)
		}
		if !st.Synced() {
			t.Fatalf("seed %d: not synced after all was acknowledged", seed)
		}
	}
}

func ack(t *testing.T, st *Stream, m *model) {
	t.Helper()
	r := m.queue[0]
	m.queue = m.queue[1:]
	m.take(t, r)
	if _, err := st.Request(&discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}); err != nil {
		t.Fatal(err)
	}
}

func resume(t *testing.T, s *Store, m *model) *Stream {
	t.Helper()
	st := s.NewStream(Limits{Bytes: 60, FirstBytes: 60, Window: 2})
	for typ, held := range map[string]map[string]string{policy: m.policies, workload: m.workloads} {
		known := map[string]string{}
		for k, v := range held {
			known[k] = v
		}
		if _, err := st.Request(&discovery.DeltaDiscoveryRequest{TypeUrl: typ, InitialResourceVersions: known}); err != nil {
			t.Fatal(err)
		}
	}
	return st
}

// mutate moves a few workloads to other policies; a policy goes only with its
// last reference, as derive does it.
func mutate(t *testing.T, s *Store, rnd *rand.Rand, refs map[string]string, step int) {
	t.Helper()
	var ups []Upsert
	var rms []Removal
	used := map[string]bool{}
	for range 1 + rnd.IntN(3) {
		w := fmt.Sprint("w", rnd.IntN(8))
		if rnd.IntN(4) == 0 {
			delete(refs, w)
			ups = slices.DeleteFunc(ups, func(u Upsert) bool { return u.Name == w })
			rms = append(rms, Removal{workload, w})
			continue
		}
		refs[w] = fmt.Sprint("p", rnd.IntN(5))
		rms = slices.DeleteFunc(rms, func(r Removal) bool { return r.Name == w })
		ups = slices.DeleteFunc(ups, func(u Upsert) bool { return u.Name == w })
		ups = append(ups, up(workload, w, fmt.Sprintf("%s/%d", refs[w], step)))
	}
	for _, p := range refs {
		used[p] = true
	}
	for i := range 5 {
		p := fmt.Sprint("p", i)
		switch {
		case used[p] && s.tables[policy].live[p] == nil:
			ups = append(ups, up(policy, p, fmt.Sprint(step)))
		case !used[p]:
			rms = append(rms, Removal{policy, p})
		}
	}
	if _, err := s.Apply(ups, rms); err != nil {
		t.Fatal(err)
	}
}

func current(s *Store, typ string) map[string]string {
	out := map[string]string{}
	for _, r := range s.Resources(typ) {
		out[r.Name] = r.Version
	}
	return out
}

// FuzzRequests feeds a stream arbitrary sequences of requests and changes: no
// panic, no endless answer.
func FuzzRequests(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Add([]byte{2, 9, 1, 6, 6, 0, 3, 3, 7, 1, 8, 2, 5})
	names := []string{"*", "a", "b", "net/1", "net/2", "ns/svc", ""}
	f.Fuzz(func(t *testing.T, script []byte) {
		s := NewStore(policy, workload)
		st := s.NewStream(Limits{Bytes: 40, Window: 2, Names: 5})
		var nonces []string
		next := func() int {
			if len(script) == 0 {
				return 0
			}
			b := script[0]
			script = script[1:]
			return int(b)
		}
		for len(script) > 0 {
			typ := []string{policy, workload, "other"}[next()%3]
			name, other := names[next()%len(names)], names[next()%len(names)]
			switch next() % 4 {
			case 0:
				u := up(typ, name, other, other)
				u.Via = []string{names[next()%len(names)]}
				_, _ = s.Apply([]Upsert{u}, nil) // an unserved type is an error here, by design
			case 1:
				_, _ = s.Apply(nil, []Removal{{typ, name}}) // as above
			default:
				req := &discovery.DeltaDiscoveryRequest{TypeUrl: typ}
				flags := next()
				if flags&1 != 0 {
					req.ResourceNamesSubscribe = []string{name, other}
				}
				if flags&2 != 0 {
					req.ResourceNamesUnsubscribe = []string{other}
				}
				if flags&4 != 0 {
					req.InitialResourceVersions = map[string]string{name: "v", other: ""}
				}
				if flags&8 != 0 && len(nonces) > 0 {
					req.ResponseNonce = nonces[flags%len(nonces)]
				}
				if flags&16 != 0 {
					req.ErrorDetail = &discovery.Status{Message: other}
				}
				if _, err := st.Request(req); err != nil {
					return
				}
			}
			for i := 0; ; i++ {
				resp, err := st.Next()
				if err != nil || resp == nil {
					break
				}
				nonces = append(nonces, resp.Nonce)
				if i > 100 {
					t.Fatal("responses do not end")
				}
			}
			_ = st.Synced()
			_ = st.Status()
		}
	})
}

// BenchmarkPush is what one changed workload among 100k costs per stream.
func BenchmarkPush(b *testing.B) {
	s := NewStore(workload)
	ups := make([]Upsert, 100_000)
	for i := range ups {
		ups[i] = up(workload, fmt.Sprint("cluster//Pod/ns/", i), strings.Repeat("x", 300), fmt.Sprint("net/", i))
	}
	if _, err := s.Apply(ups, nil); err != nil {
		b.Fatal(err)
	}
	st := s.NewStream(Limits{Window: 1 << 30})
	if _, err := st.Request(sub(workload)); err != nil {
		b.Fatal(err)
	}
	if _, err := st.Next(); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		one := up(workload, ups[i%len(ups)].Name, fmt.Sprint(i), ups[i%len(ups)].Aliases...)
		if _, err := s.Apply([]Upsert{one}, nil); err != nil {
			b.Fatal(err)
		}
		if resp, err := st.Next(); err != nil || len(resp.Resources) != 1 {
			b.Fatal(resp, err)
		}
		st.subs[workload].unacked = st.subs[workload].unacked[:0]
	}
}

// BenchmarkFirst is the first response for 100k workloads.
func BenchmarkFirst(b *testing.B) {
	s := NewStore(workload)
	ups := make([]Upsert, 100_000)
	for i := range ups {
		ups[i] = up(workload, fmt.Sprint("cluster//Pod/ns/", i), strings.Repeat("x", 300), fmt.Sprint("net/", i))
	}
	if _, err := s.Apply(ups, nil); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		st := s.NewStream(Limits{})
		if _, err := st.Request(sub(workload)); err != nil {
			b.Fatal(err)
		}
		if resp, err := st.Next(); err != nil || len(resp.Resources) != len(ups) {
			b.Fatal(err)
		}
	}
}
