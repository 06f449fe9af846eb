package app

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"

	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

// account is a pod's, open until the test ends.
func (w *world) account(p *testPod) *ledger.Account {
	a := p.node.ledger.Pod("uid-" + p.name)
	w.Cleanup(a.Close)
	return a
}

// TestBothEndsPayForAConnection: what a pod opens is accounted to it as much as
// what it takes in, and comes back.
func TestBothEndsPayForAConnection(t *testing.T) {
	w, a, b := twoPods(t)
	accounts := []*ledger.Account{w.account(a), w.account(b)}
	c, err := w.dial(a, fmt.Sprintf("%s:8080", b.ip))
	w.check(err)
	_, err = c.Read(make([]byte, 64))
	w.check(err)
	for i, acct := range accounts {
		for _, r := range []ledger.Resource{ledger.Streams, ledger.Connections, ledger.Bytes} {
			if acct.InUse(r) == 0 {
				t.Errorf("%s are not accounted to pod %s", r, []string{"a", "b"}[i])
			}
		}
	}
	w.check(c.Close())
	eventually(t, "streams and their windows come back", func() bool {
		left := int64(0)
		for _, acct := range accounts {
			left += acct.InUse(ledger.Streams) + acct.InUse(ledger.Bytes) + acct.InUse(ledger.Turns) + acct.InUse(ledger.Handshakes)
		}
		return left == 0
	})
}

// TestAttackedNeighbours: while one pod misuses the proxies of both nodes, or
// is misused, each request of others is answered; afterwards nothing is held.
func TestAttackedNeighbours(t *testing.T) {
	w, a, b := twoPods(t)
	attacker, target, out := w.addPod("c", "node-1"), w.addPod("d", "node-2"), w.addHost("outside")
	w.setWorkload(a, "node-1")
	w.setWorkload(b, "node-2")
	w.setWorkload(attacker, "node-1")
	over, end := context.WithCancel(context.Background())
	w.listen(target, 8083, func(*net.TCPConn) { <-over.Done() })
	w.listen(target, 8080, whoami)
	t.Cleanup(end) // before the listener's, which waits for them
	dial := func(ctx context.Context, from *testPod, port int) net.Conn {
		c, err := from.NS.Dial(ctx, &net.Dialer{Timeout: waitLimit}, "tcp", fmt.Sprintf("%s:%d", target.ip, port))
		if err != nil {
			return nil // the attacker's share is used up, or the attack over
		}
		context.AfterFunc(ctx, func() { _ = c.Close() })
		return c
	}
	for _, attack := range []struct {
		name string
		n    int
		do   func(ctx context.Context)
	}{
		{"handshakes that never end", 100, func(ctx context.Context) {
			if c := dial(ctx, out, 15008); c != nil {
				_, _ = c.Write([]byte{22, 3, 1})
				<-ctx.Done()
			}
		}},
		{"streams that nobody reads", 32, func(ctx context.Context) {
			if c := dial(ctx, attacker, 8083); c != nil {
				for buf := make([]byte, 64<<10); ; {
					if _, err := c.Write(buf); err != nil {
						return
					}
				}
			}
		}},
		{"connections without a word", 4, func(ctx context.Context) {
			for ctx.Err() == nil {
				if c := dial(ctx, attacker, 8080); c != nil {
					_ = c.Close()
				}
			}
		}},
		{"connections that are refused", 4, func(ctx context.Context) {
			for ctx.Err() == nil {
				if c := dial(ctx, attacker, 8099); c != nil {
					_ = c.Close()
				}
			}
		}},
	} {
		t.Run(attack.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			var wg sync.WaitGroup
			for range attack.n {
				wg.Go(func() { attack.do(ctx) })
			}
			for range 20 {
				w.wantAnswer(a, fmt.Sprintf("%s:8080", b.ip), a.ip.String()+"\nhello")
			}
			cancel()
			wg.Wait()
		})
	}
	end()
	for _, p := range []*testPod{attacker, a} {
		acct := w.account(p)
		eventually(t, "what "+p.name+" had comes back", func() bool {
			return acct.InUse(ledger.Streams)+acct.InUse(ledger.Bytes)+acct.InUse(ledger.Dials)+acct.InUse(ledger.Turns) == 0
		})
	}
}
