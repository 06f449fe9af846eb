package app

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/test/fakexds"
)

// TestNotReadyWhileAPodIsNotServed: readiness names the pod whose ports are
// taken, and comes back when the pod has gone.
func TestNotReadyWhileAPodIsNotServed(t *testing.T) {
	w := newWorld(t)
	b := w.addHost("b")
	taken, err := b.NS.Listen(t.Context(), &net.ListenConfig{}, "tcp", ":15001")
	w.check(err)
	defer taken.Close()
	uds := filepath.Join(t.TempDir(), "zds.sock")
	agent, err := handoff.Listen(handoff.ServerConfig{Path: uds})
	w.check(err)
	ctx, stop := context.WithCancel(context.Background())
	donec := make(chan error, 1)
	go func() { donec <- agent.Run(ctx) }()
	defer func() { stop(); <-donec }()
	p := startProcess(t, w, fakexds.New(t), "node-1", uds)
	ready := func() bool { code, _ := get(t, p.ready); return code == 200 }
	eventually(t, "ready", ready)

	ns, err := b.NS.Dup()
	w.check(err)
	if err := agent.Add(ctx, handoff.Pod{UID: "uid-b", Name: "b", Namespace: "default", ServiceAccount: "b", NS: ns}); err == nil || !strings.Contains(err.Error(), "15001") {
		t.Errorf("the agent was told %v, want the port that is taken", err)
	}
	eventually(t, "not ready, by the pod's name", func() bool {
		code, body := get(t, p.ready)
		return code == 500 && strings.Contains(body, "uid-b")
	})
	w.check(agent.Del(ctx, "uid-b"))
	eventually(t, "ready again", ready)
	p.stop()
	w.check(<-p.donec)
}
