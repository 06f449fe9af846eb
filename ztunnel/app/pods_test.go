package app

import (
	"context"
	"fmt"
	"io"
	"testing"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
)

func TestPodsComeGoAndReturn(t *testing.T) {
	w, a, b := twoPods(t)
	addr := fmt.Sprintf("%s:8080", b.ip)
	c, err := w.dial(a, addr)
	w.check(err)
	_, err = c.Read(make([]byte, 64))
	w.check(err)

	give := func() {
		ns, err := b.NS.Dup()
		w.check(err, b.node.pods.AddPod(context.Background(), handoff.Pod{UID: "uid-b", Name: "b", Namespace: "default", ServiceAccount: "b", NS: ns}))
	}
	give() // the same again changes nothing
	_, err = io.WriteString(c, "x")
	w.check(err)
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatalf("a repeated hand-over disturbed a connection: %v", err)
	}

	b.node.pods.SnapshotDone([]string{"uid-of-another"})
	w.wantRefusedSoon(a, addr) // captured and nobody listens: refused, never let through
	if _, err := io.ReadAll(c); err == nil {
		t.Error("the drained pod's connection ended in order, want a reset at the deadline")
	}
	b.node.logs.want(t, "connection closed due to connection drain")
	give()
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")
	w.check(b.node.pods.DelPod("uid-b"), b.node.pods.DelPod("uid-b"))
	w.wantRefusedSoon(a, addr)
}

// A pod may come back while connections of its earlier stay still drain: a
// label taken off and put on again, a hand-over with another namespace. The end
// of the first stay must not end the second.
func TestPodReturnsBeforeItsDrainEnds(t *testing.T) {
	w, a, b := twoPods(t)
	addr := fmt.Sprintf("%s:8080", b.ip)
	old, err := w.dial(a, addr)
	w.check(err)
	_, err = old.Read(make([]byte, 64))
	w.check(err)

	w.check(a.node.pods.DelPod("uid-a"))
	ns, err := a.NS.Dup()
	w.check(err, a.node.pods.AddPod(context.Background(), handoff.Pod{UID: "uid-a", Name: "a", Namespace: "default", ServiceAccount: "a", NS: ns}))
	kept, err := w.dial(a, addr) // on a tunnel of the second stay
	w.check(err)
	_, err = kept.Read(make([]byte, 64))
	w.check(err)

	if _, err := io.ReadAll(old); err == nil {
		t.Error("the drained connection ended in order, want a reset at the deadline")
	}
	a.node.logs.want(t, "connection closed due to connection drain")
	_, err = io.WriteString(kept, "x")
	w.check(err)
	if _, err := kept.Read(make([]byte, 1)); err != nil {
		t.Errorf("the end of the first stay cut a connection of the second: %v", err)
	}
	w.check(kept.Close())
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")
}
