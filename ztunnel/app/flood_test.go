package app

import (
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/inpod"
)

// accessLines counts lines of the access log that are no debug output.
func accessLines(n *testNode) (lines int) {
	for l := range strings.Lines(n.logs.text()) {
		if strings.Contains(l, "\taccess\t") && !strings.Contains(l, "\tdebug\t") {
			lines++
		}
	}
	return lines
}

// TestClientsCannotFillTheLog: one that cancels its streams, or fails its
// handshakes, over and over, gets a line and a sum.
func TestClientsCannotFillTheLog(t *testing.T) {
	const loops = 100
	w, _, b := twoPods(t)
	out := w.addHost("outside")
	authority := fmt.Sprintf("%s:8080", b.ip)
	counted := func(what string, count func() uint64) {
		eventually(t, what, func() bool { return count() >= loops })
		if n := accessLines(b.node); n > 8 { // two sorts, each a line per interval, on a slow machine
			t.Errorf("%s: %d lines for %d of them:\n%s", what, n, loops, b.node.logs.text())
		}
	}
	nobody := w.peer(out, tls.Certificate{})
	for range loops {
		if _, err := w.connect(nobody, b, authority); err == nil {
			t.Fatal("accepted without a certificate")
		}
	}
	counted("failed handshakes", func() (n uint64) {
		for _, r := range b.node.flow.Refusals() {
			n += r.Count
		}
		return n
	})
	d := w.peer(out, w.ca.Leaf(t, friend))
	for range loops {
		s, err := w.connect(d, b, authority)
		w.check(err)
		_, err = io.ReadFull(s, make([]byte, 1))
		w.check(err, s.Reset())
	}
	counted("cancelled streams", func() uint64 { return uint64(w.closed(b.node)) })
}

// closed counts connections that have ended.
func (w *world) closed(n *testNode) float64 {
	return w.counter(n, "istio_tcp_connections_closed_total")
}

// TestNoShareIsARefusal: what a pod's own share refuses is counted like all
// else, with the side that it was on; protocol faults of a peer too.
func TestNoShareIsARefusal(t *testing.T) {
	c := Defaults()
	c.NodeName = "n1"
	a := assemble(c, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), nil)
	defer a.node.store.Close()
	conn := func(local, remote string) net.Conn {
		return &addressed{local: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(local)), remote: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(remote))}
	}
	a.node.refusedByShare(handoff.Pod{UID: "p"}, conn("10.0.0.1:15001", "10.0.0.1:4000"), inpod.ErrNoShare)
	a.node.refusedByShare(handoff.Pod{UID: "p"}, conn("10.0.0.1:15006", "10.0.0.2:4000"), inpod.ErrNoShare)
	fault := &hbone.ServeError{Stage: hbone.StageH2, Err: &hbone.ConnError{Code: hbone.CodeProtocol, Reason: "x"}}
	a.node.refused(handoff.Pod{UID: "p"}, conn("10.0.0.1:15008", "10.0.0.3:4000"), fault)
	for _, quiet := range []error{nil, io.EOF, &hbone.ServeError{Stage: hbone.StageTLS, Err: io.EOF},
		&hbone.ServeError{Stage: hbone.StageH2, Err: &hbone.ConnError{Remote: true}}, &hbone.ServeError{Stage: hbone.StageH2, Err: io.ErrUnexpectedEOF}} {
		a.node.refused(handoff.Pod{UID: "p"}, conn("10.0.0.1:15008", "10.0.0.3:4000"), quiet)
	}
	got := map[string]flow.Reason{}
	for _, r := range a.node.flow.Refusals() {
		got[string(r.Direction)+" "+r.Source] = r.Reason
	}
	if len(got) != 3 || got["outbound 10.0.0.1"] != flow.ReasonLimit || got["inbound 10.0.0.2"] != flow.ReasonLimit || got["inbound 10.0.0.3"] != flow.ReasonH2 {
		t.Errorf("%v", got)
	}
}

type addressed struct {
	net.Conn
	local, remote net.Addr
}

func (a *addressed) LocalAddr() net.Addr  { return a.local }
func (a *addressed) RemoteAddr() net.Addr { return a.remote }
