package app

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
)

var friend = identity.MustParse("spiffe://cluster.local/ns/default/sa/friend")

// peer is a foreign HBONE client in a namespace, with whatever certificate.
func (w *world) peer(from *testPod, leaf tls.Certificate) *hbone.Dialer {
	d := hbone.NewDialer(hbone.DialerConfig{
		DialTransport: func(ctx context.Context, k hbone.Key) (net.Conn, error) {
			return from.NS.Dial(ctx, &net.Dialer{Timeout: waitLimit}, "tcp", k.Addr.String())
		},
		TLS: func(context.Context, hbone.Key) (*tls.Config, error) {
			return &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true, Certificates: []tls.Certificate{leaf}}, nil
		},
	})
	w.Cleanup(func() { _ = d.Close() })
	return d
}

func (w *world) connect(d *hbone.Dialer, to *testPod, authority string) (*hbone.Stream, error) {
	ctx, cancel := context.WithTimeout(context.Background(), waitLimit)
	defer cancel()
	s, _, err := d.Connect(ctx, hbone.Key{Pod: "p", Local: friend, Addr: netip.AddrPortFrom(to.ip, 15008)}, hbone.ConnectRequest{Authority: authority})
	if s != nil {
		w.Cleanup(func() { _ = s.Close() })
	}
	return s, err
}

func TestConnectToWhatIsNotOurs(t *testing.T) {
	w, _, b := twoPods(t)
	out := w.addHost("outside")
	d := w.peer(out, w.ca.Leaf(t, friend))
	for _, c := range []struct {
		authority string
		status    int
	}{
		{"10.9.9.9:8080", 400},
		{"169.254.169.254:80", 400},
		{"127.0.0.1:15000", 400},
		{b.ip.String(), 400},
		{b.ip.String() + ":0", 400},
		{b.ip.String() + ":65536", 400},
		{"svc-b.default.svc.cluster.local", 400},
		{"nowhere.default.svc.cluster.local:80", 503},
		{b.ip.String() + ":15001", 503},
		{b.ip.String() + ":15006", 503},
		{b.ip.String() + ":15008", 503},
		{b.ip.String() + ":15080", 503},
		{b.ip.String() + ":8099", 503},
	} {
		_, err := w.connect(d, b, c.authority)
		if s, ok := errors.AsType[*hbone.StatusError](err); !ok || s.Code != c.status {
			t.Errorf("CONNECT %s: %v, want status %d", c.authority, err, c.status)
		}
	}
	s, err := w.connect(d, b, b.ip.String()+":8080")
	w.check(err)
	buf := make([]byte, 64)
	n, err := s.Read(buf)
	if got := string(buf[:n]); got != out.ip.String()+"\n" {
		t.Errorf("application saw %q, %v", got, err)
	}
	w.setService(b, "10.96.0.1")
	s, err = w.connect(d, b, "svc-b.default.svc.cluster.local:80")
	w.check(err)
	w.check(s.Close())
}

func TestWrongClientCertificates(t *testing.T) {
	w, _, b := twoPods(t)
	out := w.addHost("outside")
	elsewhere := meshca.New(t, "elsewhere.example")
	foreign := identity.MustParse("spiffe://elsewhere.example/ns/default/sa/friend")
	for _, c := range []struct {
		name string
		leaf tls.Certificate
		why  string
	}{
		{"another root", elsewhere.Leaf(t, friend), "not trusted"},
		{"another trust domain", elsewhere.Leaf(t, foreign), "no roots are known for trust domain elsewhere.example"},
		{"our root, another trust domain", w.ca.Leaf(t, foreign), "no roots are known"},
		{"expired", w.ca.Leaf(t, friend, meshca.Expired()), "expired"},
		{"not yet valid", w.ca.Leaf(t, friend, meshca.NotYetValid()), "not valid before"},
		{"two identities", w.ca.Leaf(t, friend, meshca.URIs(friend.String(), "spiffe://cluster.local/ns/default/sa/admin")), "2 URI SANs"},
		{"no identity", w.ca.Leaf(t, identity.ID{}), "no URI SAN"},
		{"not a workload", w.ca.Leaf(t, friend, meshca.URIs("spiffe://cluster.local/friend")), "not a workload identity"},
		{"none", tls.Certificate{}, "certificate"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := w.connect(w.peer(out, c.leaf), b, b.ip.String()+":8080"); err == nil {
				t.Fatal("accepted")
			}
			b.node.logs.want(t, "warn\taccess\tconnection failed", "src.addr="+out.ip.String(), c.why)
		})
	}
}

func TestWrongServerCertificates(t *testing.T) {
	w := newWorld(t)
	w.addNode("node-1")
	w.addNode("node-2")
	elsewhere := meshca.New(t, "elsewhere.example")
	cases := []struct {
		name  string
		chain func(id identity.ID, pub *ecdsa.PublicKey) ([]string, error)
		why   string
	}{
		{"root", func(id identity.ID, pub *ecdsa.PublicKey) ([]string, error) {
			return elsewhere.ChainPEM(elsewhere.Sign(t, pub, id)), nil
		}, "not trusted"},
		{"late", func(id identity.ID, pub *ecdsa.PublicKey) ([]string, error) {
			return w.ca.ChainPEM(w.ca.Sign(t, pub, id, meshca.Expired())), nil
		}, "expired"},
		{"down", func(identity.ID, *ecdsa.PublicKey) ([]string, error) { return nil, errors.New("CA is on holiday") }, ""},
	}
	for _, c := range cases {
		w.authority["default/"+c.name] = c.chain
	}
	a := w.addPod("a", "node-1")
	for _, c := range cases {
		p := w.addPod(c.name, "node-2")
		w.listen(p, 8080, whoami)
		w.wantRefused(a, fmt.Sprintf("%s:8080", p.ip))
		a.node.logs.want(t, "error\taccess", "dst.addr="+p.ip.String())
	}
	w.nodes["node-2"].logs.want(t, "warn\tcert", "expired")
	w.nodes["node-2"].logs.want(t, "warn\tcert", "CA is on holiday")
}

func TestGarbageOnEveryPort(t *testing.T) {
	w, a, b := twoPods(t)
	out := w.addHost("outside")
	for _, port := range []int{15001, 15006, 15008} {
		for _, from := range []*testPod{out, b} {
			c, err := w.dial(from, fmt.Sprintf("%s:%d", b.ip, port))
			if err != nil {
				continue // reset already, before the kernel said it was there
			}
			_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n\x00\xff\x16\x03\x01")
			if n, err := io.Copy(io.Discard, c); err == nil && n > 100 {
				t.Errorf("port %d answered garbage with %d bytes", port, n)
			}
		}
	}
	b.node.logs.want(t, "warn\taccess\tconnection failed", "tls")
	b.node.logs.want(t, "connection failed", "proxy's own port")
	w.wantAnswer(a, fmt.Sprintf("%s:8080", b.ip), a.ip.String()+"\nhello")
}

func TestSilentPeersCostNobody(t *testing.T) {
	w, a, b := twoPods(t)
	out := w.addHost("outside")
	for range 50 {
		_, err := w.dial(out, fmt.Sprintf("%s:15008", b.ip))
		w.check(err)
	}
	w.wantAnswer(a, fmt.Sprintf("%s:8080", b.ip), a.ip.String()+"\nhello")
}

func TestApplicationThatNeverReads(t *testing.T) {
	w, a, b := twoPods(t)
	stop := make(chan struct{})
	w.listen(b, 8083, func(*net.TCPConn) { <-stop })
	t.Cleanup(func() { close(stop) }) // before the listener's, which waits for them
	for range 4 {
		c, err := w.dial(a, fmt.Sprintf("%s:8083", b.ip))
		w.check(err, c.SetWriteDeadline(time.Now().Add(300*time.Millisecond)))
		_, err = c.Write(make([]byte, 32<<20))
		if ne, ok := errors.AsType[net.Error](err); !ok || !ne.Timeout() {
			t.Fatalf("32 MiB into an application that never reads: %v, want to be held back", err)
		}
	}
	w.wantAnswer(a, fmt.Sprintf("%s:8080", b.ip), a.ip.String()+"\nhello")
}

func TestSlowXDSAndUnknownPod(t *testing.T) {
	w := newWorld(t)
	n := w.addNode("node-1")
	w.addNode("node-2")
	a, b := w.addPod("a", "node-1"), w.addPod("b", "node-2")
	w.setWorkload(a, "node-1")
	w.listen(b, 8080, whoami)
	w.remove("type.googleapis.com/istio.workload.Address", "Kubernetes//Pod/default/a")
	donec := make(chan error, 1)
	go func() {
		got, err := w.ask(a, fmt.Sprintf("%s:8080", b.ip))
		if err == nil && got != a.ip.String()+"\nhello" {
			err = fmt.Errorf("got %q", got)
		}
		donec <- err
	}()
	eventually(t, "connection waits", func() bool { return n.flow.Len("uid-a") == 1 })
	w.setWorkload(a, "node-1") // the control plane catches up
	w.check(<-donec)
}
