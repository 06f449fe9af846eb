package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
)

// relayTo, in the environment, makes this binary a relay between two addresses: a process to kill.
const relayTo = "AMBIT_TEST_RELAY_TO"

// relayProcess joins connections to two addresses until it is killed.
func relayProcess(addrs string) {
	from, to, _ := bytes.Cut([]byte(addrs), []byte(","))
	a, err := net.Dial("tcp", string(from))
	if err != nil {
		os.Exit(2)
	}
	b, err := net.Dial("tcp", string(to))
	if err != nil {
		os.Exit(2)
	}
	_ = Join(context.Background(), a.(*net.TCPConn), b.(*net.TCPConn), nil)
	os.Exit(3)
}

// A relay that is killed amid a transfer must not let its peers believe that they have all of it.
func TestKilledRelayResets(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), relayTo+"="+ln.Addr().String()+","+ln.Addr().String())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	a, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := a.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(b, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]net.Conn{"sender": a, "receiver": b} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s reads %v, want ECONNRESET", name, err)
		}
	}
}

// Orderly ends deliver every byte to readers that are late, however much the sockets still hold when Join returns.
func TestOrderlyEndsLoseNothing(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<12) // fits the sockets' buffers: Join ends before it is read
	var wg sync.WaitGroup
	for range 50 {
		client, a := tcpPair(t)
		server, b := tcpPair(t)
		wg.Go(func() {
			defer client.Close()
			defer server.Close()
			for _, c := range []Conn{client, server} {
				if _, err := c.Write(data); err != nil {
					t.Error(err)
				}
				_ = c.CloseWrite()
			}
			if err := Join(t.Context(), a, b, nil); err != nil {
				t.Error(err)
			}
			for _, c := range []Conn{client, server} {
				if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
					t.Errorf("read %d bytes of %d, %v", len(got), len(data), err)
				}
			}
		})
	}
	wg.Wait()
}
