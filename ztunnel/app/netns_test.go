package app

import (
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/security"
)

func twoPods(t *testing.T) (w *world, a, b *testPod) {
	w = newWorld(t)
	w.addNode("node-1")
	w.addNode("node-2")
	a, b = w.addPod("a", "node-1"), w.addPod("b", "node-2")
	w.setWorkload(a, "node-1") // node-2 learns what came before it
	w.listen(b, 8080, whoami)
	return w, a, b
}

func TestMeshTrafficIsHBONEWithTheClientsAddress(t *testing.T) {
	w, a, b := twoPods(t)
	w.wantAnswer(a, fmt.Sprintf("%s:8080", b.ip), a.ip.String()+"\nhello")
	a.node.logs.want(t, "info\taccess\tconnection complete", "src.addr="+a.ip.String(), `src.workload="a"`,
		`dst.workload="b"`, "dst.addr="+b.ip.String()+":15008", "dst.hbone_addr="+b.ip.String()+":8080",
		`src.identity="spiffe://cluster.local/ns/default/sa/a"`, `dst.identity="spiffe://cluster.local/ns/default/sa/b"`,
		`direction="outbound"`, "bytes_recv=5", `transport="hbone"`)
	b.node.logs.want(t, "info\taccess\tconnection complete", `direction="inbound"`, `src.identity="spiffe://cluster.local/ns/default/sa/a"`, "bytes_recv=5")
	if w.v6 {
		w.wantAnswer(a, fmt.Sprintf("[%s]:8080", b.v6), a.v6.String()+"\nhello")
	}
	// The same tunnel again, and the way back.
	w.wantAnswer(a, fmt.Sprintf("%s:8080", b.ip), a.ip.String()+"\nhello")
	w.listen(a, 9090, whoami)
	w.wantAnswer(b, fmt.Sprintf("%s:9090", a.ip), b.ip.String()+"\nhello")
	w.wantAnswer(a, fmt.Sprintf("%s:9090", a.ip), a.ip.String()+"\nhello") // itself, uncaptured
}

func TestServiceIsBalancedAndPortMapped(t *testing.T) {
	w, a, b := twoPods(t)
	w.setService(b, "10.96.0.1")
	w.wantAnswer(a, "10.96.0.1:80", a.ip.String()+"\nhello")
	a.node.logs.want(t, "connection complete", `dst.service="svc-b.default.svc.cluster.local"`, `direction="outbound"`)
	b.node.logs.want(t, "connection complete", `dst.service="svc-b.default.svc.cluster.local"`, `direction="inbound"`)
	w.wantRefused(a, "10.96.0.1:81")
	a.node.logs.want(t, "error\taccess", "no route to 10.96.0.1:81")
	// A pod that calls its own service.
	w.wantAnswer(b, "10.96.0.1:80", b.ip.String()+"\nhello")
}

func TestUnknownDestinationPassesThrough(t *testing.T) {
	w, a, _ := twoPods(t)
	out := w.addHost("outside")
	w.listen(out, 7070, whoami)
	w.wantAnswer(a, fmt.Sprintf("%s:7070", out.ip), a.ip.String()+"\nhello")
	a.node.logs.want(t, "connection complete", `transport="passthrough"`)
}

func strict() *security.Authorization {
	return &security.Authorization{Name: "istio_converted_static_strict", Namespace: "istio-system", Scope: security.Scope_WORKLOAD_SELECTOR,
		Action: security.Action_DENY, Rules: []*security.Rule{{Clauses: []*security.Clause{{Matches: []*security.Match{{
			NotPrincipals: []*security.StringMatch{{MatchType: &security.StringMatch_Presence{}}}}}}}}}}
}

func TestPlaintextFromOutside(t *testing.T) {
	w, a, b := twoPods(t)
	out := w.addHost("outside")
	addr := fmt.Sprintf("%s:8080", b.ip)
	w.wantAnswer(out, addr, out.ip.String()+"\nhello")
	b.node.logs.want(t, "connection complete", `transport="plaintext"`, `direction="inbound"`)
	if w.v6 {
		w.wantAnswer(out, fmt.Sprintf("[%s]:8080", b.v6), out.v6.String()+"\nhello")
	}
	w.setPolicy(strict())
	w.setWorkload(b, "node-2", "istio-system/istio_converted_static_strict")
	w.wantRefused(out, addr)
	b.node.logs.want(t, "error\taccess", `why="STRICT: plaintext from a client outside the mesh`)
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")
}

func principal(name string, action security.Action, who string) *security.Authorization {
	return &security.Authorization{Name: name, Namespace: "default", Scope: security.Scope_NAMESPACE, Action: action,
		Rules: []*security.Rule{{Clauses: []*security.Clause{{Matches: []*security.Match{{
			Principals: []*security.StringMatch{{MatchType: &security.StringMatch_Exact{Exact: "cluster.local/ns/default/sa/" + who}}}}}}}}}}
}

func TestPolicyDecidesAndSaysWhy(t *testing.T) {
	w, a, b := twoPods(t)
	addr := fmt.Sprintf("%s:8080", b.ip)
	w.setPolicy(principal("allow-other", security.Action_ALLOW, "other"))
	w.wantRefused(a, addr)
	a.node.logs.want(t, "error\taccess", "denied by destination's policy")
	b.node.logs.want(t, "error\taccess", "no ALLOW policy of namespace default matched")
	w.setPolicy(principal("allow-other", security.Action_ALLOW, "a"))
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")
	w.setPolicy(principal("deny-a", security.Action_DENY, "a"))
	w.wantRefused(a, addr)
	b.node.logs.want(t, "error\taccess", `why="policy default/deny-a rule 1"`)
}

func TestPolicyChangeCutsALiveConnection(t *testing.T) {
	w, a, b := twoPods(t)
	c, err := w.dial(a, fmt.Sprintf("%s:8080", b.ip))
	w.check(err)
	buf := make([]byte, 64)
	n, err := c.Read(buf)
	w.check(err)
	if got := string(buf[:n]); got != a.ip.String()+"\n" {
		t.Fatalf("greeting %q", got)
	}
	w.setPolicy(principal("deny-a", security.Action_DENY, "a"))
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read after the change: %v, want a reset", err)
	}
	b.node.logs.want(t, "error\taccess", "connection closed due to policy change", `why="policy default/deny-a rule 1"`)
	// Removal of the policy: allowed again.
	w.remove(api.AuthorizationType, "default/deny-a")
	w.wantAnswer(a, fmt.Sprintf("%s:8080", b.ip), a.ip.String()+"\nhello")
}

func TestResetAndHalfCloseTravel(t *testing.T) {
	w, a, b := twoPods(t)
	w.listen(b, 8081, func(c *net.TCPConn) { // resets at the first byte
		_, _ = c.Read(make([]byte, 1))
		_ = c.SetLinger(0)
	})
	c, err := w.dial(a, fmt.Sprintf("%s:8081", b.ip))
	w.check(err)
	_, err = io.WriteString(c, "x")
	w.check(err)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("server's reset reached the client as %v", err)
	}
	gotc := make(chan error, 1)
	w.listen(b, 8082, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "go")
		_, err := io.ReadAll(c)
		gotc <- err
	})
	c, err = w.dial(a, fmt.Sprintf("%s:8082", b.ip))
	w.check(err)
	_, err = c.Read(make([]byte, 2))
	w.check(err, c.SetLinger(0), c.Close())
	if err := <-gotc; !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("client's reset reached the server as %v", err)
	}
}

func TestApplicationThatDoesNotListen(t *testing.T) {
	w, a, b := twoPods(t)
	w.wantRefused(a, fmt.Sprintf("%s:8099", b.ip))
	a.node.logs.want(t, "error\taccess", "http status: 503", "does the application listen there?")
	b.node.logs.want(t, "error\taccess", "dial application at "+b.ip.String()+":8099", "connection refused")
}
