package app

import (
	"fmt"
	"io"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/workload"
)

// A pod with a deletion timestamp still runs: its peers are told to open no
// more streams on the tunnels that they have, what is open goes on, and who
// still comes is served.
func TestTerminatingPodSendsItsPeersAwayInOrder(t *testing.T) {
	w, a, b := twoPods(t)
	addr := fmt.Sprintf("%s:8080", b.ip)
	open, err := w.dial(a, addr)
	w.check(err)
	_, err = open.Read(make([]byte, 64))
	w.check(err)
	before := handshakes(t, b.node)

	m := w.workload(b, "node-2")
	x, err := proto.Marshal(&ambit.WorkloadExtension{Terminating: true})
	w.check(err)
	m.GetWorkload().Extensions = []*workload.Extension{{Name: api.WorkloadExtension,
		Config: &anypb.Any{TypeUrl: api.WorkloadExtensionType, Value: x}}}
	w.push(api.AddressType, m.GetWorkload().Uid, m)

	// The tunnel that exists takes streams until its peer has heard.
	for range 1000 {
		w.wantAnswer(a, addr, a.ip.String()+"\nhello")
		if handshakes(t, b.node) > before {
			break
		}
	}
	if handshakes(t, b.node) == before {
		t.Error("no second tunnel after 1000 connections: the peer was not told to leave the first one")
	}
	if _, err := io.WriteString(open, "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(open, make([]byte, 1)); err != nil {
		t.Errorf("a connection that was open did not go on: %v", err)
	}
}

// handshakes counts tunnels that were ever accepted on a node.
func handshakes(t *testing.T, n *testNode) (sum float64) {
	t.Helper()
	families, err := n.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "ambit_ztunnel_hbone_handshakes_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.Label {
				if l.GetName() == "side" && l.GetValue() == "server" {
					sum += m.GetCounter().GetValue()
				}
			}
		}
	}
	return sum
}
