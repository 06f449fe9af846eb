package resolve

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/test/leak"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

func TestMain(m *testing.M) { leak.Main(m) }

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func TestResolvePrefersTheFamily(t *testing.T) {
	for _, c := range []struct {
		name  string
		found []netip.Addr
		v6    bool
		want  map[string]bool
	}{
		{"IPv4 of both", addrs("192.0.2.1", "2001:db8::1"), false, map[string]bool{"192.0.2.1": true}},
		{"IPv6 of both", addrs("192.0.2.1", "2001:db8::1"), true, map[string]bool{"2001:db8::1": true}},
		{"the other family", addrs("2001:db8::1"), false, map[string]bool{"2001:db8::1": true}},
		{"mapped IPv4", addrs("::ffff:192.0.2.1"), false, map[string]bool{"192.0.2.1": true}},
		{"any of several", addrs("192.0.2.1", "192.0.2.2"), false, map[string]bool{"192.0.2.1": true, "192.0.2.2": true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var asked string
			r := New(Config{Lookup: func(_ context.Context, host string) ([]netip.Addr, error) { asked = host; return c.found, nil }})
			got := map[string]bool{}
			for range 100 {
				a, err := r.Resolve(t.Context(), nil, "H.Example.com", c.v6)
				if err != nil {
					t.Fatal(err)
				}
				got[a.String()] = true
			}
			if fmt.Sprint(got) != fmt.Sprint(c.want) || asked != "h.example.com." {
				t.Errorf("got %v for %q, want %v", got, asked, c.want)
			}
		})
	}
}

func TestAnswersHoldAndExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lookups, fail := 0, error(nil)
		r := New(Config{Lookup: func(context.Context, string) ([]netip.Addr, error) { lookups++; return addrs("192.0.2.1"), fail }})
		want := func(n int, ok bool) {
			t.Helper()
			_, err := r.Resolve(t.Context(), nil, "h", false)
			if lookups != n || (err == nil) != ok {
				t.Fatalf("%d lookups, %v; want %d, %v", lookups, err, n, ok)
			}
		}
		want(1, true)
		time.Sleep(goodFor - 1)
		want(1, true)
		time.Sleep(time.Nanosecond)
		fail = errors.New("no such host")
		want(2, false)
		want(2, false)
		time.Sleep(badFor)
		fail = nil
		want(3, true)
	})
}

func TestOneLookupForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var lookups atomic.Int32
		goc := make(chan struct{})
		r := New(Config{Lookup: func(ctx context.Context, _ string) ([]netip.Addr, error) {
			lookups.Add(1)
			select {
			case <-goc:
				return addrs("192.0.2.1"), nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = r.Resolve(ctx, nil, "h", false) })
		synctest.Wait()
		for range 20 {
			wg.Go(func() {
				if _, err := r.Resolve(t.Context(), nil, "h", false); err != nil {
					t.Error(err)
				}
			})
		}
		impatient, giveUp := context.WithCancel(t.Context())
		wg.Go(func() {
			if _, err := r.Resolve(impatient, nil, "h", false); !errors.Is(err, context.Canceled) {
				t.Errorf("gave up with %v", err)
			}
		})
		synctest.Wait()
		giveUp()
		cancel() // of who came first: the others still get their answer
		synctest.Wait()
		close(goc)
		wg.Wait()
		if n := lookups.Load(); n != 1 {
			t.Errorf("%d lookups", n)
		}
	})
}

func TestLookupTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(Config{Lookup: func(ctx context.Context, _ string) ([]netip.Addr, error) { <-ctx.Done(); return nil, ctx.Err() }})
		start := time.Now()
		if _, err := r.Resolve(t.Context(), nil, "h", false); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if d := time.Since(start); d != lookupTimeout {
			t.Errorf("after %v", d)
		}
	})
}

func TestEverythingIsBounded(t *testing.T) {
	reg := prometheus.NewRegistry()
	r := New(Config{Registerer: reg, Lookup: func(context.Context, string) ([]netip.Addr, error) { return nil, nil }})
	for i := range 2 * maxNames {
		if _, err := r.Resolve(t.Context(), &mesh.Workload{WorkloadName: "w", Traits: &mesh.Traits{}}, fmt.Sprint("h", i), false); !errors.Is(err, ErrNoAddress) {
			t.Fatal(err)
		}
	}
	if n := len(r.names); n > maxNames {
		t.Errorf("%d names", n)
	}
	fs, err := reg.Gather()
	if err != nil || len(fs) != 1 || fs[0].GetName() != "istio_on_demand_dns_total" || len(fs[0].Metric) != maxSeries+1 {
		t.Errorf("%v, %d families", err, len(fs))
	}
}
