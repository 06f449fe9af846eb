package flow

import (
	"errors"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/origin"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// TestFieldsAreTheReferencesThenOurs pins a line with every field, in order.
func TestFieldsAreTheReferencesThenOurs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var book logbook
		who := origin.Origin{PID: 42, Cgroup: 7, Comm: [16]byte{'c', '"', '\n'}}
		table := New(Config{Logger: book.logger("info"), Names: func(o origin.Origin) (string, string) {
			if o != who {
				t.Errorf("names of %+v", o)
			}
			return "", "0123456789abc"
		}})
		from, to := src.Copy(), dst.Copy()
		from.ClusterID, to.ClusterID = "c1", "c2"
		c, _ := table.Begin(t.Context(), Record{Direction: Outbound, Pod: "a", SrcAddr: netip.MustParseAddrPort("10.0.0.1:999"),
			DstAddr: netip.MustParseAddrPort("10.0.0.2:15008"), HBONEAddr: "10.0.0.2:80", Src: from, Dst: to, SrcID: from.Identity, DstID: to.Identity,
			Service: "b.default.svc.cluster.local", Transport: HBONE})
		c.Join(goodParent)
		c.Record().Retries, c.Record().Origin = 1, who
		c.Describe()
		c.verdict.DryRun = "dry-run policy x/y rule 1 would deny"
		c.Stats.Sent.Store(5)
		c.Stats.Received.Store(7)
		time.Sleep(3 * time.Millisecond)
		ms := time.Millisecond
		c.Stats.Times = relay.Times{Began: time.Now(),
			A:      sockopt.TCPInfo{RTT: 45 * time.Microsecond, RwndLimited: 20 * ms, Retransmits: 99},
			B:      sockopt.TCPInfo{RTT: 2 * ms, Retransmits: 4, Busy: 30 * ms, RwndLimited: 5 * ms, SndbufLimited: 6 * ms},
			Stream: 40 * ms, Tunnel: 50 * ms, Queue: 60 * ms}
		time.Sleep(10 * ms)
		c.End(Failed(ReasonStream, errors.New("broken")))
		keys := regexp.MustCompile(`[a-z_.]+=`)
		line := book.take()[0]
		_, fields, _ := strings.Cut(line, "connection complete\t")
		var got []string
		for _, k := range keys.FindAllString(fields, -1) {
			got = append(got, strings.TrimSuffix(k, "="))
		}
		want := strings.Fields(`src.addr src.workload src.namespace src.identity src.cluster
			dst.addr dst.hbone_addr dst.service dst.workload dst.namespace dst.identity dst.cluster
			direction bytes_sent bytes_recv duration
			transport retries conn_id trace_id src.process src.pid src.container src.cgroup dry_run
			wait.setup wait.app wait.peer wait.tunnel wait.proxy
			app.rtt_us app.retransmits net.rtt_us net.retransmits net.busy net.rwnd_limited net.sndbuf_limited
			error reason`)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s\n%s", diff, line)
		}
		for _, want := range []string{`src.process="c??" src.pid=42 src.container="0123456789abc" src.cgroup=7`, `bytes_sent=7 bytes_recv=5 duration="13ms"`, "trace_id=\"" + goodID,
			"wait.setup=3 wait.app=20 wait.peer=40 wait.tunnel=50 wait.proxy=60 app.rtt_us=45 app.retransmits=99 net.rtt_us=2000 net.retransmits=4 net.busy=30 net.rwnd_limited=5 net.sndbuf_limited=6"} {
			if !strings.Contains(line, want) {
				t.Errorf("no %s in %s", want, line)
			}
		}
	})
}

// TestTimesAreOfTheRightSide: the application is the other side's socket on the
// way in, and what took no time is not told.
func TestTimesAreOfTheRightSide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var book logbook
		table := New(Config{Logger: book.logger("info")})
		c, _ := table.Begin(t.Context(), Record{Direction: Inbound, Dst: dst, Transport: Plaintext})
		c.Describe()
		c.Stats.Times = relay.Times{Began: time.Now(), A: sockopt.TCPInfo{RTT: time.Microsecond, RwndLimited: 7 * time.Millisecond},
			B: sockopt.TCPInfo{RwndLimited: 9 * time.Millisecond, RTT: time.Second}, Queue: time.Microsecond}
		c.End(nil)
		line := book.take()[0]
		if i := strings.Index(line, " wait."); i < 0 || line[i:] != " wait.app=9 wait.peer=7 app.rtt_us=1000000 net.rtt_us=1" {
			t.Errorf("%s", line)
		}
		table.Refuse(Record{Direction: Inbound, Dst: dst}, Failed(ReasonTLS, errors.New("no")))
		if line := book.take()[0]; strings.Contains(line, "wait.") {
			t.Errorf("%s", line)
		}
	})
}

// TestSourceAndDestinationOfAGroup: what people look for, not what is unique.
func TestSourceAndDestinationOfAGroup(t *testing.T) {
	ap := netip.MustParseAddrPort
	for _, c := range []struct {
		rec      Record
		src, dst string
	}{
		{Record{Src: src, Dst: dst, Service: "b.svc", HBONEAddr: "10.0.0.2:80", DstAddr: ap("10.0.0.2:15008")}, "shop/a", "b.svc:80"},
		{Record{Src: &mesh.Workload{Name: "x", Traits: &mesh.Traits{Namespace: "n"}}, Dst: dst, DstAddr: ap("10.0.0.2:80")}, "n/x", "default/b:80"},
		{Record{SrcID: peer, SrcAddr: ap("10.0.0.1:5"), DstAddr: ap("10.0.0.2:80")}, peer.String(), "10.0.0.2:80"},
		{Record{SrcAddr: ap("10.0.0.1:5"), HBONEAddr: "b.svc:80"}, "10.0.0.1", "b.svc:80"},
		{Record{}, "unknown", "unknown"},
	} {
		if s, d := c.rec.source(), c.rec.destination(); s != c.src || d != c.dst {
			t.Errorf("%q → %q, want %q → %q", s, d, c.src, c.dst)
		}
	}
}
