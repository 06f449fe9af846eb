package redirect_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

func TestExcludedPorts(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		r := s.redirector
		s.listenProxy(t)
		for _, port := range []string{"53", "80", "8080", "9000", "9010"} {
			answer(t, listen(t, s.app, s.client.NS, "[::]:"+port, nil), "server")
			answer(t, listen(t, s.app, s.pod.NS, "[::]:"+port, nil), "app")
		}
		pods, clients := addresses()
		want := func(when, who string, inbound bool, port uint16) {
			t.Helper()
			for i := range pods {
				from, to := s.pod.NS, clients[i]
				if inbound {
					from, to = s.client.NS, pods[i]
				}
				c, err := connect(s.app, from, netip.AddrPortFrom(to, port), nil)
				if err != nil || !strings.HasPrefix(c.line, who+" ") {
					t.Errorf("%s: inbound %t, %v port %d was answered %q, %v, want %s", when, inbound, to, port, c.line, err, who)
				}
			}
		}
		rules := redirect.PodRules{IPv6: netlab.IPv6(), ExcludeOutbound: "53,8080,9000-9009", ExcludeInbound: "80,9010"}
		check(t, r.Apply(s.pod.NS, rules), r.Check(s.pod.NS, rules))
		for port, out := range map[uint16]bool{53: true, 80: false, 8080: true, 9000: true, 9010: false} {
			who := map[bool]string{true: "server", false: "15001"}[out]
			want("excluded", who, false, port)
			in := port == 80 || port == 9010
			who = map[bool]string{true: "app", false: "15006"}[in]
			want("excluded", who, true, port)
		}
		// Exactly the ports that are named: both sides go on as before.
		rules.ExcludeOutbound, rules.ExcludeInbound = "", ""
		check(t, r.Apply(s.pod.NS, rules), r.Check(s.pod.NS, rules))
		want("no longer excluded", "15001", false, 8080)
		want("no longer excluded", "15006", true, 80)
		// As many as there may be.
		most, err := redirect.ParsePorts("1,3,5,7,9,11,13,15,17,19,21,23,25,27,80-8080,65535")
		check(t, err)
		rules.ExcludeOutbound, rules.ExcludeInbound = most, most
		check(t, r.Apply(s.pod.NS, rules), r.Check(s.pod.NS, rules))
		want("the last range but one", "server", false, 8080)
		want("the last range but one", "app", true, 8080)
		want("beyond all ranges", "15001", false, 9000)
	})
}
