package inpod

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/test/leak"
	"github.com/ambit-mesh/ambit/test/netlab"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

func TestMain(m *testing.M) { leak.Main(m) }

// shortOfFiles is a listener of a process without free descriptors.
type shortOfFiles struct {
	mu     sync.Mutex
	tries  []time.Time
	closed bool
}

func (l *shortOfFiles) Each(func(*netns.Conn)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return &net.OpError{Op: "accept", Err: net.ErrClosed}
	}
	l.tries = append(l.tries, time.Now())
	return &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
}

func (l *shortOfFiles) Close() error { l.mu.Lock(); defer l.mu.Unlock(); l.closed = true; return nil }
func (l *shortOfFiles) Addr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort("10.0.0.1:15001"))
}

// TestAcceptBacksOffWithoutDescriptors: 5 ms doubled to 1 s, and the end of the
// pod does not wait for the next try.
func TestAcceptBacksOffWithoutDescriptors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log, _ := boot.NewLogger(&out, "text", "info")
		p := newPod(handoff.Pod{}, Handlers{}, log)
		ln := &shortOfFiles{}
		p.accept(ln, nil, Blocking(func(context.Context, sockopt.Socket) { t.Error("nothing was accepted") }))
		time.Sleep(10*time.Second + time.Millisecond)
		synctest.Wait()
		n := len(ln.tries)
		if first, last := ln.tries[1].Sub(ln.tries[0]), ln.tries[n-1].Sub(ln.tries[n-2]); first != 5*time.Millisecond || last != time.Second || n > 20 {
			t.Errorf("%d tries, first wait %v, last %v", n, first, last)
		}
		if !strings.Contains(out.String(), "too many open files") || !strings.Contains(out.String(), "10.0.0.1:15001") {
			t.Errorf("log does not say what fails where: %s", out.String())
		}
		begun := time.Now()
		p.stopAccepting()
		if d := time.Since(begun); d != 0 {
			t.Errorf("the end waited %v for the next try", d)
		}
	})
}

// TestNeighboursAreTurnedAwayAtOnce: a pod that drains takes no new connections
// by any way, however long its own go on.
func TestNeighboursAreTurnedAwayAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ns, err := netns.Own()
		if err != nil {
			t.Fatal(err)
		}
		connc := make(chan struct{})
		var turnedAway atomic.Bool
		log, _ := boot.NewLogger(&bytes.Buffer{}, "text", "info")
		p := newPod(handoff.Pod{NS: ns}, Handlers{Wait: func() { turnedAway.Store(true) }}, log)
		p.conns.Go(func() { <-connc })
		donec := make(chan struct{})
		go func() { defer close(donec); p.drain(t.Context()) }()
		synctest.Wait()
		if !turnedAway.Load() {
			t.Error("neighbours still get in while a connection of the pod goes on")
		}
		close(connc)
		<-donec
	})
}

// pods are served by what greets with the name of the port.
func manager(t *testing.T) *Manager {
	greet := func(s string) Handler {
		return Blocking(func(ctx context.Context, c sockopt.Socket) {
			_, _ = c.Write([]byte(s)) // the test reads it or fails
			<-ctx.Done()
		})
	}
	m := New(Config{DrainTimeout: time.Millisecond, Serve: func(handoff.Pod) (Handlers, error) {
		return Handlers{Outbound: greet("outbound"), Plaintext: greet("plaintext"), HBONE: greet("hbone")}, nil
	}})
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		m.Shutdown(ctx)
	})
	return m
}

func dialIn(t *testing.T, ns *netns.NS, port string) (net.Conn, error) {
	t.Helper()
	return ns.Dial(t.Context(), &net.Dialer{Timeout: 60 * time.Second}, "tcp", "127.0.0.1:"+port)
}

// TestAnotherNamespaceReplacesThePod: a pod's sandbox was made anew under the
// same uid. The listeners move, and the connections of the one before end.
func TestAnotherNamespaceReplacesThePod(t *testing.T) {
	netlab.Require(t)
	m := manager(t)
	first, second := netlab.MustHost(t, "first"), netlab.MustHost(t, "second")
	add := func(h *netlab.Host) *netns.NS {
		t.Helper()
		ns, err := h.NS.Dup()
		if err != nil {
			t.Fatal(err)
		}
		if err := m.AddPod(t.Context(), handoff.Pod{UID: "u", Name: "web", Namespace: "shop", NS: ns}); err != nil {
			t.Fatal(err)
		}
		return ns
	}
	read := func(c net.Conn) string {
		t.Helper()
		b := make([]byte, 32)
		if err := c.SetReadDeadline(time.Now().Add(60 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, err := c.Read(b)
		if err != nil && n == 0 {
			return "ended"
		}
		return string(b[:n])
	}
	firstNS := add(first)
	c, err := dialIn(t, first.NS, "15001")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := read(c); got != "outbound" {
		t.Fatalf("first namespace: %q", got)
	}
	add(first) // the same again is no change
	if m.NS("u") != firstNS {
		t.Error("the same namespace replaced the pod")
	}
	add(second)
	if m.NS("u").Inode() != second.NS.Inode() || len(m.Pods()) != 1 {
		t.Errorf("served in namespace %d, want %d", m.NS("u").Inode(), second.NS.Inode())
	}
	if got := read(c); got != "ended" {
		t.Errorf("a connection of the namespace before went on: %q", got)
	}
	if c, err := dialIn(t, first.NS, "15001"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the namespace before is still served: %v", err)
		if err == nil {
			_ = c.Close()
		}
	}
	for port, want := range map[string]string{"15001": "outbound", "15006": "plaintext", "15008": "hbone"} {
		c, err := dialIn(t, second.NS, port)
		if err != nil {
			t.Fatal(err)
		}
		if got := read(c); got != want {
			t.Errorf("port %s: %q", port, got)
		}
		_ = c.Close() // read to the end of interest
	}
}

// TestAcceptWaitsForTheShareOfOpenings: while the pod's openings are used up
// nothing more is served; the end of the pod does not wait for them, and what
// was accepted by then is served.
func TestAcceptWaitsForTheShareOfOpenings(t *testing.T) {
	log, _ := boot.NewLogger(&bytes.Buffer{}, "text", "info")
	for _, end := range []bool{false, true} {
		account := ledger.New(ledger.Limits{ledger.Openings: 1}).Pod("u")
		if !account.TryAcquire(ledger.Openings, 1) {
			t.Fatal("refused")
		}
		tl, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ln, err := netns.NewListener(tl)
		if err != nil {
			t.Fatal(err)
		}
		p := newPod(handoff.Pod{}, Handlers{}, log)
		var released atomic.Bool
		servedc := make(chan struct{})
		p.accept(ln, account, Blocking(func(ctx context.Context, _ sockopt.Socket) {
			defer close(servedc)
			if !released.Load() {
				t.Error("served before there was an opening to be had")
			}
			ledger.Opened(ctx)
		}))
		c, err := net.Dial("tcp4", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		for account.InUse(ledger.Connections) == 0 { // accepted, and waits
			runtime.Gosched()
		}
		released.Store(true)
		if end {
			p.stopAccepting()
		} else {
			account.Release(ledger.Openings, 1)
		}
		<-servedc
		if !end {
			p.stopAccepting()
		}
		p.conns.Wait()
		_ = c.Close() // served
	}
}
