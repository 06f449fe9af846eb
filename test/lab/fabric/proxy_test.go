package fabric

import (
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/test/lab/process"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// TestMain lets this program be what process.Start starts again.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == process.Verb {
		os.Exit(process.Enter())
	}
	os.Exit(m.Run())
}

func TestPodsReachServicesAcrossNodes(t *testing.T) {
	netlab.Require(t)
	if _, err := exec.LookPath("nft"); err != nil && !netlab.Required() {
		t.Skipf("needs nft (apt-get install nftables): %v", err)
	}
	n, err := New(t.TempDir(), 2)
	if err != nil && netlab.Required() {
		t.Fatal(err)
	}
	if err != nil {
		t.Skipf("needs mounts of network namespaces: %v", err)
	}
	defer n.Close()
	client, err := n.AddPod(n.Nodes[0], "client")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Remove()
	server, err := n.AddPod(n.Nodes[1], "server")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Remove()
	for i, vip := range []string{"10.96.1.1", "fd00:10:96::1:1"}[:len(server.Addrs)] {
		t.Run(vip, func(t *testing.T) {
			at := netip.AddrPortFrom(server.Addrs[i], 8080)
			ln, err := server.NS.Listen(t.Context(), &net.ListenConfig{}, "tcp", at.String())
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			go func() {
				for c, err := ln.Accept(); err == nil; c, err = ln.Accept() {
					_, _ = io.WriteString(c, c.RemoteAddr().String()) // the client compares
					_ = c.Close()
				}
			}()
			addr := netip.MustParseAddr(vip)
			vips := []VIP{{Addr: addr, Proto: "tcp", Port: 80, Backends: []netip.AddrPort{at}}, {Addr: addr, Proto: "tcp", Port: 81}}
			for _, m := range n.Nodes {
				if err := m.SetVIPs(t.Context(), vips); err != nil {
					t.Fatal(err)
				}
			}
			for from, pod := range map[string]*Pod{"client": client, "server itself": server} {
				c, err := pod.NS.Dial(context.Background(), &net.Dialer{}, "tcp", netip.AddrPortFrom(addr, 80).String())
				if err != nil {
					t.Fatalf("dial from %s: %v", from, err)
				}
				seen, err := io.ReadAll(c)
				_ = c.Close() // read to its end
				if err != nil || from == "client" && !strings.Contains(string(seen), client.Addrs[i].String()) {
					t.Errorf("%s is seen as %q, error %v", from, seen, err)
				}
			}
			if c, err := client.NS.Dial(context.Background(), &net.Dialer{}, "tcp", netip.AddrPortFrom(addr, 81).String()); err == nil {
				_ = c.Close() // it should not be
				t.Error("a port without backends accepts connections")
			}
		})
	}
}
