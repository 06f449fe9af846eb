package app

import (
	"fmt"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

var traceID = regexp.MustCompile(`trace_id="([0-9a-f]{32})"`)

// TestFromResetToCause: the application sees a reset; the source's line says
// who refused and why, and the destination's line of the same connection, found
// by its id, names the policy. Both proxies list it among their refusals.
func TestFromResetToCause(t *testing.T) {
	w, a, b := twoPods(t)
	addr := fmt.Sprintf("%s:8080", b.ip)
	idOf := func(line string) string {
		m := traceID.FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("no trace id in %s", line)
		}
		return m[1]
	}
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")
	ok := idOf(a.node.logs.want(t, "info\taccess\tconnection complete", `direction="outbound"`))
	b.node.logs.want(t, "info\taccess\tconnection complete", `direction="inbound"`, ok)

	w.setPolicy(principal("deny-a", security.Action_DENY, "a"))
	// Of those alike each proxy tells of the one that ends first; its own, were there several at a time.
	w.wantRefused(a, addr)
	line := a.node.logs.want(t, "error\taccess", `reason="policy"`, "denied by destination's policy")
	b.node.logs.want(t, "error\taccess", idOf(line), `why="policy default/deny-a rule 1"`, `reason="policy"`)
	for range 4 {
		w.wantRefused(a, addr)
	}
	for _, c := range []struct {
		n    *testNode
		dir  flow.Direction
		why  string
		from string
	}{{a.node, flow.Outbound, "", "default/a"}, {b.node, flow.Inbound, "policy default/deny-a rule 1", "default/a"}} {
		// The row's count follows the application's reset by a moment.
		var rows []flow.Refusal
		eventually(t, "five refusals in one row", func() bool {
			rows = c.n.flow.Refusals()
			return len(rows) == 1 && rows[0].Count == 5
		})
		if r := rows[0]; r.Reason != flow.ReasonPolicy || r.Direction != c.dir || r.Why != c.why || r.Source != c.from || r.Destination != "default/b:8080" {
			t.Errorf("%+v", r)
		}
	}
	lines := 0
	for l := range strings.Lines(b.node.logs.text()) {
		if strings.Contains(l, "error\taccess") {
			lines++
		}
	}
	if lines > 2 { // the first, and a sum if an interval ended meanwhile
		t.Errorf("%d lines for five identical refusals", lines)
	}
}

// text is what has been logged.
func (l *logBuffer) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestWhatWaitedIsTold: a server that does not read shows on its own side as
// the application, on the client's as the peer.
func TestWhatWaitedIsTold(t *testing.T) {
	w, a, b := twoPods(t)
	releasec := make(chan struct{})
	w.listen(b, 8083, func(c *net.TCPConn) {
		<-releasec
		_ = c.SetLinger(0)
	})
	c, err := w.dial(a, fmt.Sprintf("%s:8083", b.ip))
	w.check(err)
	donec := make(chan struct{})
	go func() {
		defer close(donec)
		block := make([]byte, 256<<10)
		for err == nil { // until the server's reset
			_, err = c.Write(block)
		}
	}()
	// The server's own socket tells when it has taken no more for a while.
	eventually(t, "a full window", func() bool { return stalled(a.node.flow.List) })
	close(releasec)
	<-donec
	b.node.logs.want(t, "info\taccess\tconnection complete", `direction="inbound"`, " wait.app=", `reset_by="dst"`)
	a.node.logs.want(t, "info\taccess\tconnection complete", `direction="outbound"`, " wait.peer=", `reset_by="dst"`)
}

// stalled reports whether the one connection has moved bytes and goes on moving
// none.
func stalled(list func() []flow.Live) bool {
	moved := func() (n uint64) {
		for _, l := range list() {
			n += l.BytesRecv
		}
		return n
	}
	for last, still := moved(), 0; still < 20; still++ {
		time.Sleep(5 * time.Millisecond)
		if now := moved(); now == 0 || now != last {
			return false
		}
	}
	return true
}
