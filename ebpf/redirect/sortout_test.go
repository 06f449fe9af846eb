package redirect

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/ambit-mesh/ambit/ebpf/sockdiag"
)

func TestSortOut(t *testing.T) {
	socket := func(state sockdiag.State, local, remote string, more ...func(*sockdiag.Socket)) sockdiag.Socket {
		s := sockdiag.Socket{State: state, Local: netip.MustParseAddrPort(local), Remote: netip.MustParseAddrPort(remote), Cgroup: 7}
		for _, f := range more {
			f(&s)
		}
		return s
	}
	proxy := func(s *sockdiag.Socket) { s.Cgroup = 9 }
	marked := func(s *sockdiag.Socket) { s.Mark = MarkProxy }
	const est, sent, recv, listen = sockdiag.Established, sockdiag.SynSent, sockdiag.SynRecv, sockdiag.Listen
	server := socket(listen, "[::]:8080", "[::]:0")
	for _, tc := range []struct {
		name    string
		rules   PodRules
		proxies map[uint64]bool
		in      []sockdiag.Socket
		older   []int // of in
		half    []int
	}{
		{name: "older ones", in: []sockdiag.Socket{
			server, socket(est, "10.0.0.1:8080", "10.0.0.2:40000"), socket(sockdiag.CloseWait, "[fd00::1]:40000", "[fd00::2]:80"),
			socket(sockdiag.FinWait2, "10.0.0.1:40000", "10.0.0.2:80"),
		}, older: []int{1, 2, 3}},
		{name: "half-open ones", in: []sockdiag.Socket{
			socket(sent, "10.0.0.1:40000", "10.0.0.2:80"), socket(recv, "10.0.0.1:8080", "10.0.0.2:40000"),
		}, half: []int{0, 1}},
		{name: "nothing that stays in the pod", in: []sockdiag.Socket{
			socket(est, "127.0.0.1:40000", "127.0.0.1:80"), socket(est, "[::1]:40000", "[::1]:80"),
			socket(est, "10.0.0.1:40000", "10.0.0.1:80"), socket(est, "10.0.0.1:80", "10.0.0.1:40000"),
		}},
		{name: "captured by an alias", in: []sockdiag.Socket{
			socket(est, "10.0.0.1:40000", "127.64.1.2:15001"), socket(est, "[fd00::1]:40000", "[fd16:9254:7127:a15a::5]:15001"),
		}},
		{name: "captured by translation", in: []sockdiag.Socket{
			socket(est, "10.0.0.1:40000", "10.0.0.2:80"), socket(est, "127.0.0.1:15001", "10.0.0.1:40000", marked),
			socket(est, "10.0.0.1:40001", "10.0.0.3:53"), socket(est, "127.0.0.1:15053", "10.0.0.1:40001", marked),
		}},
		{name: "an app on the proxy's port captures nothing", in: []sockdiag.Socket{
			socket(est, "10.0.0.1:40000", "10.0.0.2:80"), socket(est, "127.0.0.1:15001", "10.0.0.1:40000"),
		}, older: []int{0}},
		{name: "inbound through the proxy", in: []sockdiag.Socket{
			socket(est, "10.0.0.1:8080", "10.0.0.2:40000"), socket(est, "10.0.0.2:40000", "10.0.0.1:8080", marked),
			socket(est, "10.0.0.1:15008", "10.0.0.2:41000", marked), socket(recv, "10.0.0.1:15008", "10.0.0.2:41001"),
			socket(recv, "10.0.0.1:8080", "10.0.0.2:41001", marked),
		}},
		{name: "a mark proves nothing where cgroups do", proxies: map[uint64]bool{9: true}, in: []sockdiag.Socket{
			socket(est, "10.0.0.1:40000", "10.0.0.2:80", marked), socket(est, "10.0.0.1:40001", "10.0.0.2:80", proxy),
		}, older: []int{0}},
		{name: "outbound only", rules: PodRules{BypassInbound: true}, in: []sockdiag.Socket{
			server, socket(est, "10.0.0.1:8080", "10.0.0.2:40000"), socket(est, "10.0.0.1:40000", "10.0.0.2:80"), socket(recv, "10.0.0.1:8080", "10.0.0.2:40001"),
		}, older: []int{2}},
		{name: "ports left out", rules: PodRules{ExcludeInbound: "8080", ExcludeOutbound: "80,440-450"}, in: []sockdiag.Socket{
			server, socket(est, "10.0.0.1:8080", "10.0.0.2:40000"), socket(est, "10.0.0.1:40000", "10.0.0.2:80"),
			socket(sent, "10.0.0.1:40000", "10.0.0.2:443"), socket(est, "10.0.0.1:40000", "10.0.0.2:8080"), socket(est, "10.0.0.1:443", "10.0.0.2:40000"),
		}, older: []int{4, 5}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for i := range tc.in {
				tc.in[i].Cookie = uint64(i)
			}
			got := sortOut(tc.in, tc.rules, tc.proxies)
			numbers := func(sockets []sockdiag.Socket) (out []int) {
				for _, s := range sockets {
					out = append(out, int(s.Cookie))
				}
				return out
			}
			if o, h := numbers(got.Connections), numbers(got.HalfOpen); !slices.Equal(o, tc.older) || !slices.Equal(h, tc.half) {
				t.Errorf("older are %v and half-open %v, want %v and %v", o, h, tc.older, tc.half)
			}
		})
	}
}
