package derive

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
)

func vipTable(v *vips) map[netip.Addr]nn {
	out := map[netip.Addr]nn{}
	for host := range v.claims {
		for _, a := range v.addrs(host) {
			out[a] = host
		}
	}
	return out
}

// Whatever order hosts come, go and addresses are declared in, the outcome is
// that of the hosts choosing in order of age.
func TestVIPsDoNotDependOnOrder(t *testing.T) {
	src := func(i int) source { return source{"x", nn{"", fmt.Sprint(i)}} }
	for seed := range uint64(8) {
		r := rand.New(rand.NewPCG(seed, 2))
		v := newVIPs()
		claims, declared := map[nn]time.Time{}, map[source][]netip.Prefix{}
		// Most of the range is taken, so that hosts collide all the time.
		var taken []netip.Addr
		for i := range 0xfc00 {
			taken = append(taken, netip.AddrFrom4([4]byte{240, 240, byte(i >> 8), byte(i)}))
		}
		declared[src(-1)] = singles(taken)
		v.declare(src(-1), declared[src(-1)])
		for range 300 {
			host := nn{"n", fmt.Sprintf("h%d.example.com", r.IntN(150))}
			switch r.IntN(5) {
			case 0, 1:
				delete(claims, host)
				v.release(host)
			case 2:
				i := r.IntN(5)
				declared[src(i)] = nil
				if r.IntN(3) > 0 {
					var some []netip.Addr
					for range 1 + r.IntN(100) {
						some = append(some, netip.AddrFrom4([4]byte{240, 240, 252 + byte(r.IntN(4)), byte(r.IntN(256))}))
					}
					declared[src(i)] = singles(some)
				}
				v.declare(src(i), declared[src(i)])
			default:
				claims[host] = time.Unix(int64(r.IntN(3)), 0)
				v.claim(host, claims[host])
			}
		}
		fresh := newVIPs()
		for host, created := range claims {
			fresh.claim(host, created)
		}
		for s, ps := range declared {
			fresh.declare(s, ps)
		}
		got, want := vipTable(v), vipTable(fresh)
		if !maps.Equal(got, want) {
			t.Fatalf("seed %d: %d addresses, %d from scratch, or others", seed, len(got), len(want))
		}
		for _, ps := range declared {
			for _, p := range ps {
				if host, both := got[p.Addr()]; both {
					t.Fatalf("seed %d: %s of %s is declared", seed, p.Addr(), host)
				}
			}
		}
		for host := range claims {
			v.release(host)
		}
		if len(v.holders)+len(v.wanted)+len(v.claims) > 0 {
			t.Fatalf("seed %d: something is left after everybody has gone: %d held, %d wanted", seed, len(v.holders), len(v.wanted))
		}
	}
}

func TestVIPsOfOneHost(t *testing.T) {
	host, other := nn{"n", "example.com"}, nn{"m", "example.com"}
	v := newVIPs()
	v.claim(host, time.Time{})
	first := v.addrs(host)
	// Written out: an upgrade must not move anybody's addresses.
	if want := "[240.240.108.158 2001:2::3e5a:119e:7451:e9f7]"; fmt.Sprint(first) != want {
		t.Errorf("addresses %v, want %s", first, want)
	}
	v.claim(other, time.Time{})
	if fmt.Sprint(v.addrs(other)) == fmt.Sprint(first) {
		t.Error("two namespaces share an address")
	}
	v.declare(source{"Pod", host}, singles(first[:1]))
	moved := v.addrs(host)
	if moved[0] == first[0] || moved[1] != first[1] {
		t.Errorf("after a pod got %s: %v", first[0], moved)
	}
	v.declare(source{"Pod", host}, nil)
	if got := v.addrs(host); fmt.Sprint(got) != fmt.Sprint(first) {
		t.Errorf("after the pod went: %v, want %v", got, first)
	}
	// One object must not take everybody's address.
	v.declare(source{"ServiceEntry", host}, []netip.Prefix{netip.MustParsePrefix("240.0.0.0/4"), netip.MustParsePrefix("::/0")})
	if got := v.addrs(host); fmt.Sprint(got) != fmt.Sprint(first) {
		t.Errorf("with ranges declared: %v, want %v", got, first)
	}
	var all []netip.Addr
	for a := vipRange4.Addr(); vipRange4.Contains(a); a = a.Next() {
		all = append(all, a)
	}
	v.declare(source{"ServiceEntry", host}, singles(all))
	if got := v.addrs(host); len(got) != 1 || got[0] != first[1] {
		t.Errorf("with every address of IPv4 declared: %v", got)
	}
}

// An older host keeps its address, whichever is seen first.
func TestVIPsOlderKeeps(t *testing.T) {
	seen := map[netip.Addr]nn{}
	var a, b nn
	for i := 0; a == b; i++ {
		h := nn{"n", fmt.Sprint("h", i)}
		v := newVIPs()
		v.claim(h, time.Time{})
		addr := v.addrs(h)[0]
		if other, hit := seen[addr]; hit {
			a, b = other, h
		}
		seen[addr] = h
	}
	for _, order := range [][]nn{{a, b}, {b, a}} {
		v := newVIPs()
		for _, h := range order {
			created := time.Unix(2, 0)
			if h == b {
				created = time.Unix(1, 0)
			}
			v.claim(h, created)
		}
		if seen[v.addrs(b)[0]] != b {
			t.Errorf("order %v: the older one has %s", order, v.addrs(b)[0])
		}
		younger := v.addrs(a)[0]
		v.release(b)
		if now := v.addrs(a)[0]; now == younger {
			t.Errorf("the younger one keeps %s after the older one has gone", now)
		}
	}
}

func BenchmarkVIPClaims(b *testing.B) {
	hosts := make([]nn, 10_000)
	for i := range hosts {
		hosts[i] = nn{"n", fmt.Sprintf("h%d.example.com", i)}
	}
	b.ReportAllocs()
	for b.Loop() {
		v := newVIPs()
		for _, h := range hosts {
			v.claim(h, time.Time{})
		}
	}
}
