package socks

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/test/memnet"
)

// peer is what a client sends, and what it is answered.
type peer struct {
	io.Reader
	out bytes.Buffer
}

func (p *peer) Write(b []byte) (int, error) { return p.out.Write(b) }

const greeting = "\x05\x01\x00"

func TestHandshake(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		want     string // the request
		err      string
		code     Code
		out      string
		left     string // not read: it belongs to the application
	}{
		{"ipv4", greeting + "\x05\x01\x00\x01\x0a\x00\x00\x01\x00\x50GET", "10.0.0.1:80", "", 0, "\x05\x00", "GET"},
		{"ipv6", greeting + "\x05\x01\x00\x04\xfd\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x1f\x90", "[fd00::1]:8080", "", 0, "\x05\x00", ""},
		{"mapped", greeting + "\x05\x01\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x0a\x00\x00\x01\x00\x50", "10.0.0.1:80", "", 0, "\x05\x00", ""},
		{"domain", greeting + "\x05\x01\x00\x03\x07web.svc\x00\x50", "web.svc:80", "", 0, "\x05\x00", ""},
		{"literal as domain", greeting + "\x05\x01\x00\x03\x0810.0.0.1\x00\x50", "10.0.0.1:80", "", 0, "\x05\x00", ""},
		{"among methods", "\x05\x03\x02\x01\x00\x05\x01\x00\x01\x0a\x00\x00\x01\x00\x50", "10.0.0.1:80", "", 0, "\x05\x00", ""},
		{"password only", "\x05\x01\x02", "", "insists on authentication", 0, "\x05\xff", ""},
		{"no methods", "\x05\x00", "", "insists on authentication", 0, "\x05\xff", ""},
		{"version 4", "\x04\x01\x00\x50", "", "version 5", 0, "", "\x00\x50"},
		{"bind", greeting + "\x05\x02\x00\x01\x0a\x00\x00\x01\x00\x50", "", "only CONNECT", BadCommand, "\x05\x00", ""},
		{"udp", greeting + "\x05\x03\x00\x01\x0a\x00\x00\x01\x00\x50", "", "only CONNECT", BadCommand, "\x05\x00", ""},
		{"address type", greeting + "\x05\x01\x00\x02", "", "address type 2", BadAddress, "\x05\x00", ""},
		{"port 0", greeting + "\x05\x01\x00\x01\x0a\x00\x00\x01\x00\x00", "", "port 0", HostUnreachable, "\x05\x00", ""},
		{"no name", greeting + "\x05\x01\x00\x03\x00\x00\x50", "", "no host name", HostUnreachable, "\x05\x00", ""},
		{"forged line", greeting + "\x05\x01\x00\x03\x03a\nb\x00\x50", "", "no host name", HostUnreachable, "\x05\x00", ""},
		{"second version", greeting + "\x04\x01\x00\x01", "", "version 5", 0, "\x05\x00", ""},
		{"cut off", greeting + "\x05\x01\x00\x01\x0a", "", "read address", 0, "\x05\x00", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := strings.NewReader(tt.in)
			p := &peer{Reader: in}
			r, err := Handshake(p)
			if tt.err == "" && (err != nil || r.String() != tt.want) || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Fatalf("%v, %v", r, err)
			}
			if e, ok := errors.AsType[*Error](err); ok != (tt.code != 0) || ok && e.Code != tt.code {
				t.Errorf("code of %v, want %d", err, tt.code)
			}
			if p.out.String() != tt.out {
				t.Errorf("answered %q, want %q", p.out.String(), tt.out)
			}
			if rest, _ := io.ReadAll(in); tt.err == "" && string(rest) != tt.left {
				t.Errorf("left %q, want %q", rest, tt.left)
			}
		})
	}
}

func FuzzHandshake(f *testing.F) {
	f.Add([]byte(greeting + "\x05\x01\x00\x01\x0a\x00\x00\x01\x00\x50GET"))
	f.Add([]byte(greeting + "\x05\x01\x00\x03\x07web.svc\x00\x50"))
	f.Add([]byte(greeting + "\x05\x01\x00\x04\xfd\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x1f\x90"))
	f.Add([]byte("\x05\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := &peer{Reader: bytes.NewReader(b)}
		r, err := Handshake(p)
		if p.out.Len() > 2 {
			t.Fatalf("answered %d bytes before the request was decided", p.out.Len())
		}
		if err != nil {
			return
		}
		if r.Port == 0 || (r.Host == "") == !r.Addr.IsValid() || r.Host != "" && !validHost(r.Host) {
			t.Fatalf("accepted %+v", r)
		}
	})
}

type call struct {
	dst netip.AddrPort
	err error
}

// serve runs a Server over one connection and returns the client's end, what
// was connected to, and what was refused.
func serve(t *testing.T, ctx context.Context, outcome error) (net.Conn, <-chan call, <-chan error, <-chan struct{}) {
	client, server := memnet.Pipe()
	calls, refused, donec := make(chan call, 1), make(chan error, 1), make(chan struct{})
	s := New(Config{
		Resolve: func(_ context.Context, host string) (netip.Addr, error) {
			if host == "web" {
				return netip.MustParseAddr("10.0.0.9"), nil
			}
			return netip.Addr{}, errors.New("no such host")
		},
		Connect: func(_ context.Context, c net.Conn, dst netip.AddrPort, opened func(error) error) {
			err := opened(outcome)
			calls <- call{dst, err}
			if outcome == nil && err == nil {
				_, _ = io.Copy(c, c) // until the client has gone
			}
		},
		Refused: func(_ net.Conn, _ Request, err error) { refused <- err },
		Code:    func(error) Code { return Refused },
	})
	go func() {
		defer close(donec)
		defer server.Close()
		s.Serve(ctx, server)
	}()
	t.Cleanup(func() { _ = client.Close(); <-donec })
	return client, calls, refused, donec
}

func ask(t *testing.T, c net.Conn, request string) string {
	t.Helper()
	if _, err := io.WriteString(c, greeting); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "\x05\x00" {
		t.Fatalf("greeted %q, %v", b, err)
	}
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	reply := make([]byte, 10)
	if _, err := io.ReadFull(c, reply); err != nil {
		t.Fatal(err)
	}
	return string(reply[:2])
}

const (
	toWeb  = "\x05\x01\x00\x03\x03web\x00\x50"
	toNone = "\x05\x01\x00\x03\x04none\x00\x50"
	toIP   = "\x05\x01\x00\x01\x0a\x00\x00\x01\x00\x50"
)

func TestServeAnswersWithTheOutcome(t *testing.T) {
	t.Run("open", func(t *testing.T) {
		c, calls, _, _ := serve(t, t.Context(), nil)
		if got := ask(t, c, toWeb); got != "\x05\x00" {
			t.Errorf("reply %q", got)
		}
		if got := <-calls; got.dst.String() != "10.0.0.9:80" || got.err != nil {
			t.Errorf("%+v", got)
		}
		if _, err := io.WriteString(c, "hello"); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
			t.Errorf("%q, %v", b, err)
		}
	})
	t.Run("refused", func(t *testing.T) {
		c, calls, _, donec := serve(t, t.Context(), errors.New("nobody there"))
		if got := ask(t, c, toIP); got != "\x05\x05" {
			t.Errorf("reply %q", got)
		}
		<-calls
		<-donec
		if rest, err := io.ReadAll(c); len(rest) > 0 || err != nil {
			t.Errorf("after the reply: %q, %v, want the end", rest, err)
		}
	})
	t.Run("no such name", func(t *testing.T) {
		c, _, refused, _ := serve(t, t.Context(), nil)
		if got := ask(t, c, toNone); got != "\x05\x04" {
			t.Errorf("reply %q", got)
		}
		if err := <-refused; !strings.Contains(err.Error(), "resolve none") {
			t.Error(err)
		}
	})
}

func TestServeWaitsNoLongerThanItMust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, refused, donec := serve(t, t.Context(), nil)
		begin := time.Now()
		if _, err := io.WriteString(c, greeting+"\x05"); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 2)
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatal(err)
		}
		<-refused
		<-donec
		if took := time.Since(begin); took != handshakeTimeout {
			t.Errorf("waited %v for a client that dribbles", took)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		_, _, _, donec := serve(t, ctx, nil)
		synctest.Wait()
		begin := time.Now()
		cancel()
		<-donec
		if took := time.Since(begin); took != 0 {
			t.Errorf("a connection under negotiation held the end up for %v", took)
		}
	})
	synctest.Test(t, func(t *testing.T) { // the deadlines are the handshake's only
		c, calls, _, _ := serve(t, t.Context(), nil)
		ask(t, c, toIP)
		<-calls
		time.Sleep(time.Hour)
		if _, err := io.WriteString(c, "x"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Errorf("an idle connection ended: %v", err)
		}
		_ = c.Close() // inside the bubble
		synctest.Wait()
	})
}

func TestReplyNamesTheAddress(t *testing.T) {
	for _, tt := range []struct{ addr, want string }{
		{"10.0.0.1:80", "\x05\x00\x00\x01\x0a\x00\x00\x01\x00\x50"},
		{"[::1]:80", "\x05\x00\x00\x04" + strings.Repeat("\x00", 15) + "\x01\x00\x50"},
	} {
		var b bytes.Buffer
		if err := Reply(&b, Succeeded, netip.MustParseAddrPort(tt.addr)); err != nil || b.String() != tt.want {
			t.Errorf("%s: %q, %v", tt.addr, b.String(), err)
		}
	}
}
