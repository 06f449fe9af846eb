package app

import (
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/outbound"
)

// setLocal is setWorkload for a pod that may be reached inside the proxy.
func (w *world) setLocal(p *testPod, node string, change ...func(*workload.Workload)) {
	w.Helper()
	m := w.workload(p, node)
	x, err := proto.Marshal(&ambit.WorkloadExtension{SameNode: ambit.WorkloadExtension_SAME_NODE_LOCAL})
	w.check(err)
	m.GetWorkload().Extensions = []*workload.Extension{{Name: api.WorkloadExtension, Config: &anypb.Any{TypeUrl: api.WorkloadExtensionType, Value: x}}}
	for _, f := range change {
		f(m.GetWorkload())
	}
	w.push(api.AddressType, m.GetWorkload().Uid, m)
}

// sameNode is two pods of one node of which b may be reached inside the proxy.
func sameNode(t *testing.T, lease outbound.LeaseConfig) (w *world, a, b *testPod) {
	w = newWorld(t)
	n := w.addNode("node-1")
	lease.Probe = n.handshake
	n.leases = outbound.NewLeases(lease)
	n.tunnels = hbone.NewDialer(hbone.DialerConfig{DialTransport: n.dialTransport, TLS: n.clientTLS, DialTimeout: 3 * time.Second})
	a, b = w.addPod("a", "node-1"), w.addPod("b", "node-1")
	w.setLocal(b, "node-1")
	w.listen(b, 8080, whoami)
	return w, a, b
}

// nft runs a command on the network between the pods.
func (w *world) nft(args ...string) {
	w.Helper()
	path, err := exec.LookPath("nft")
	if err != nil {
		w.Skip("the nft tool is needed to stand in for a CNI's NetworkPolicy")
	}
	w.check(w.router.NS.Do(func() error {
		out, err := exec.Command(path, strings.Join(args, " ")).CombinedOutput()
		if err != nil {
			return fmt.Errorf("nft %q: %w: %s", args, err, out)
		}
		return nil
	}))
}

// isolate drops, on the destination's interface, what comes from a pod: what a
// CNI does with a NetworkPolicy.
func (w *world) isolate(dst, from *testPod) {
	w.Helper()
	w.nft("add table inet netpol")
	w.nft("add chain inet netpol forward { type filter hook forward priority 0; }")
	w.nft(fmt.Sprintf("add rule inet netpol forward oifname %s ip saddr %s drop", dst.name, from.ip))
}

func TestSameNodeIsLocal(t *testing.T) {
	w, a, b := sameNode(t, outbound.LeaseConfig{})
	addr := fmt.Sprintf("%s:8080", b.ip)
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")
	for _, direction := range []string{"outbound", "inbound"} {
		line := a.node.logs.want(t, "info\taccess\tconnection complete", `direction="`+direction+`"`, `transport="local"`, "src.addr="+a.ip.String(),
			`src.workload="a"`, "dst.addr="+addr, `dst.workload="b"`, "bytes_recv=5")
		if strings.Contains(line, "identity") || strings.Contains(line, "hbone_addr") {
			t.Errorf("a line that speaks of a tunnel: %s", line)
		}
	}
	fs, err := a.node.reg.Gather()
	w.check(err)
	for _, f := range fs {
		if f.GetName() != "istio_tcp_connections_opened_total" {
			continue
		}
		for _, m := range f.Metric {
			for _, l := range m.Label {
				if l.GetName() == "connection_security_policy" && l.GetValue() == "mutual_tls" {
					t.Error("a connection inside the proxy counts as mutual_tls")
				}
			}
		}
	}
	// Through a service, and with the family of the destination.
	w.setService(b, "10.96.0.1")
	w.wantAnswer(a, "10.96.0.1:80", a.ip.String()+"\nhello")
	a.node.logs.want(t, "connection complete", `direction="inbound"`, `transport="local"`, `dst.service="svc-b.default.svc.cluster.local"`)
	if w.v6 {
		w.wantAnswer(a, fmt.Sprintf("[%s]:8080", b.v6), a.v6.String()+"\nhello")
		a.node.logs.want(t, "connection complete", `transport="local"`, "src.addr=["+a.v6.String())
	}
	w.wantRefused(a, fmt.Sprintf("%s:8099", b.ip))
	a.node.logs.want(t, "error\taccess", `direction="outbound"`, `transport="local"`, "dial application at "+b.ip.String()+":8099", "connection refused")
	// Tunnels where the control plane wants them.
	w.setWorkload(b, "node-1")
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")
	a.node.logs.want(t, "connection complete", `direction="outbound"`, `transport="hbone"`)
}

// TestSameNodeBothSidesAreLive: a connection is one of each pod's, and both
// see the bytes move.
func TestSameNodeBothSidesAreLive(t *testing.T) {
	w, a, b := sameNode(t, outbound.LeaseConfig{})
	c, err := w.dial(a, fmt.Sprintf("%s:8080", b.ip))
	w.check(err)
	greeting := a.ip.String() + "\n"
	_, err = io.ReadFull(c, make([]byte, len(greeting)))
	w.check(err)
	// Bytes are counted once they are written, and so perhaps after they are read here.
	eventually(t, "both sides, with the greeting counted", func() bool {
		var got []string
		for _, l := range a.node.flow.List() {
			got = append(got, fmt.Sprintf("%s %s %s %v", l.Direction, l.Transport, l.Pod, l.BytesSent == uint64(len(greeting))))
		}
		slices.Sort(got)
		return slices.Equal(got, []string{"inbound local uid-b true", "outbound local uid-a true"})
	})
}

func TestSameNodePolicy(t *testing.T) {
	w, a, b := sameNode(t, outbound.LeaseConfig{})
	addr := fmt.Sprintf("%s:8080", b.ip)
	c, err := w.dial(a, addr)
	w.check(err)
	_, err = io.ReadFull(c, make([]byte, len(a.ip.String())+1))
	w.check(err)
	w.setPolicy(principal("deny-a", security.Action_DENY, "a"))
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read after the change: %v, want a reset", err)
	}
	for _, direction := range []string{"inbound", "outbound"} {
		a.node.logs.want(t, "error\taccess", `direction="`+direction+`"`, `transport="local"`, "connection closed due to policy change")
	}
	w.wantRefused(a, addr)
	a.node.logs.want(t, `direction="outbound"`, `transport="local"`, "denied by destination's policy")
	a.node.logs.want(t, `direction="inbound"`, `transport="local"`, `why="policy default/deny-a rule 1"`)
	w.remove(api.AuthorizationType, "default/deny-a")
	w.setPolicy(principal("allow-a", security.Action_ALLOW, "a"))
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")
	w.setPolicy(strict()) // the identity is proven, so STRICT lets it pass
	w.setLocal(b, "node-1", func(m *workload.Workload) {
		m.AuthorizationPolicies = []string{"istio-system/istio_converted_static_strict"}
	})
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")
}

// TestSameNodeKeepsNetworkPolicy: what a CNI drops on the destination's
// interface does not come in by another way, and what it drops later ends.
func TestSameNodeKeepsNetworkPolicy(t *testing.T) {
	t.Run("before", func(t *testing.T) {
		w, a, b := sameNode(t, outbound.LeaseConfig{})
		w.isolate(b, a)
		c, err := w.dial(a, fmt.Sprintf("%s:8080", b.ip))
		w.check(err)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("read: %v, want a reset", err)
		}
		a.node.logs.want(t, "error\taccess", `direction="outbound"`, `transport="hbone"`, "NetworkPolicy")
		a.node.logs.wantNone(t, `direction="inbound"`)
	})
	t.Run("during", func(t *testing.T) {
		w, a, b := sameNode(t, outbound.LeaseConfig{Every: 100 * time.Millisecond, Again: 4 * time.Second})
		c, err := w.dial(a, fmt.Sprintf("%s:8080", b.ip))
		w.check(err)
		_, err = io.ReadFull(c, make([]byte, len(a.ip.String())+1))
		w.check(err)
		w.isolate(b, a)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("read: %v, want a reset", err)
		}
		for _, direction := range []string{"inbound", "outbound"} {
			a.node.logs.want(t, "error\taccess", `direction="`+direction+`"`, `transport="local"`, "NetworkPolicy")
		}
		w.nft("delete table inet netpol")
	})
}

// TestSameNodePodLeaves: connections inside the proxy end with the pods at
// their ends, and not before they had their time.
func TestSameNodePodLeaves(t *testing.T) {
	w, a, b := sameNode(t, outbound.LeaseConfig{})
	c, err := w.dial(a, fmt.Sprintf("%s:8080", b.ip))
	w.check(err)
	_, err = io.ReadFull(c, make([]byte, len(a.ip.String())+1))
	w.check(err, b.node.pods.DelPod("uid-b"))
	_, err = io.WriteString(c, "still here") // while it drains
	w.check(err)
	_, err = io.ReadFull(c, make([]byte, len("still here")))
	w.check(err)
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read after the drain: %v, want a reset", err)
	}
	a.node.logs.want(t, "error\taccess", `direction="inbound"`, `transport="local"`, "connection drain")
}

// TestSameNodeNeedsAnIdentity: where no tunnel could be, there is nothing
// instead of it.
func TestSameNodeNeedsAnIdentity(t *testing.T) {
	w, a, b := sameNode(t, outbound.LeaseConfig{})
	w.mu.Lock()
	w.authority["default/c"] = func(identity.ID, *ecdsa.PublicKey) ([]string, error) {
		return nil, errors.New("no such pod on this node")
	}
	w.mu.Unlock()
	c := w.addPod("c", "node-1")
	w.wantRefused(c, fmt.Sprintf("%s:8080", b.ip))
	a.node.logs.want(t, "error\taccess", `src.workload="c"`, `direction="outbound"`, `transport="hbone"`, "no such pod on this node")
	a.node.logs.wantNone(t, `direction="inbound"`)
}

// wantNone asserts that no line contains all parts.
func (l *logBuffer) wantNone(t testing.TB, parts ...string) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
line:
	for s := range strings.Lines(l.b.String()) {
		for _, p := range parts {
			if !strings.Contains(s, p) {
				continue line
			}
		}
		t.Errorf("log line with %q: %s", parts, s)
		return
	}
}
