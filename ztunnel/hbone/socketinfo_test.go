package hbone

import (
	"net"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// TestSocketsAreCounted: what a tunnel's socket met is counted once, however often
// its streams look.
func TestSocketsAreCounted(t *testing.T) {
	reg := prometheus.NewRegistry()
	m := newMetrics(reg)
	m.socket(sockopt.TCPInfo{RTT: 3 * time.Millisecond, Retransmits: 4})
	m.socket(sockopt.TCPInfo{}) // a socket that has sent nothing
	of := func(name string) (n float64) {
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == name {
				n = f.GetMetric()[0].GetCounter().GetValue() + float64(f.GetMetric()[0].GetHistogram().GetSampleCount())
			}
		}
		return n
	}
	if got := of("ambit_ztunnel_hbone_retransmits_total"); got != 4 {
		t.Errorf("%v segments sent again, want 4", got)
	}
	rounds := func() int { return int(of("ambit_ztunnel_hbone_rtt_seconds")) }
	if got := rounds(); got != 1 {
		t.Errorf("%d round trips, want 1", got)
	}
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	i := socketInfo{met: m}
	first, ok := i.read(c)
	second, _ := i.read(c)
	if !ok || first.RTT == 0 || first != second {
		t.Errorf("%+v, then %+v", first, second)
	}
	if got := rounds(); got != 2 {
		t.Errorf("%d round trips, want 2: the second look came at once", got)
	}
}
