package redirect_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// TestStreams sends bytes, ends and resets through a proxy at each end, or one.
func TestStreams(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		s.carry(t, s.pod, false)
		s.carry(t, s.near, false)
		s.enrol(t, s.pod, s.near)
		for _, a := range families() {
			for _, path := range []struct {
				name     string
				from, at *netns.NS // at: where the app listens
				to       netip.Addr
				src      netip.Addr
			}{
				{"pod to pod", s.pod.NS, s.near.NS, a.near, a.pod},
				{"pod to a stranger", s.pod.NS, s.client.NS, a.client, a.pod},
				{"stranger to pod", s.client.NS, s.pod.NS, a.pod, a.client},
				{"pod to itself by its service", s.pod.NS, s.pod.NS, a.vip, a.pod},
			} {
				ln := listen(t, s.app, path.at, "[::]:8080", nil)
				for _, tc := range []struct {
					name string
					run  func(client, server *net.TCPConn) error
				}{
					{"client first", func(c, s *net.TCPConn) error { return errors.Join(says(c, s, "ping"), says(s, c, "pong")) }},
					{"server first", func(c, s *net.TCPConn) error { return errors.Join(says(s, c, "220"), says(c, s, "HELO")) }},
					{"client closes half", func(c, s *net.TCPConn) error { return halfClose(c, s) }},
					{"server closes half", func(c, s *net.TCPConn) error { return halfClose(s, c) }},
					{"client resets", func(c, s *net.TCPConn) error { return resets(c, s) }},
					{"server resets", func(c, s *net.TCPConn) error { return resets(s, c) }},
					{"much both ways", func(c, s *net.TCPConn) error { return much(c, s) }},
				} {
					s.row(t, fmt.Sprintf("%s %s, %s", a.name, path.name, tc.name), nil, func() error {
						c, err := dialAs(t.Context(), s.app, path.from, at(path.to, 8080))
						if err != nil {
							return err
						}
						defer c.Close()
						accepted, err := acceptSoon(ln)
						if err != nil {
							return err
						}
						defer accepted.Close()
						if got := remote(accepted).Addr(); got != path.src {
							return fmt.Errorf("the app sees %v, want %v", got, path.src)
						}
						return errors.Join(c.SetDeadline(deadline()), accepted.SetDeadline(deadline()), tc.run(c, accepted))
					})
				}
				ln.Close()
			}
		}
	})
}

func acceptSoon(ln net.Listener) (*net.TCPConn, error) {
	if err := ln.(*net.TCPListener).SetDeadline(deadline()); err != nil {
		return nil, err
	}
	c, err := ln.Accept()
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func says(from, to net.Conn, what string) error {
	if _, err := io.WriteString(from, what); err != nil {
		return err
	}
	b := make([]byte, len(what))
	if _, err := io.ReadFull(to, b); err != nil || string(b) != what {
		return fmt.Errorf("read %q, %w, want %q", b, err, what)
	}
	return nil
}

// halfClose has one side end while the other goes on talking.
func halfClose(one, other *net.TCPConn) error {
	if err := says(one, other, "last words"); err != nil {
		return err
	}
	if err := one.CloseWrite(); err != nil {
		return err
	}
	if n, err := other.Read(make([]byte, 1)); err != io.EOF {
		return fmt.Errorf("read %d, %v after the other side closed, want EOF", n, err)
	}
	if err := errors.Join(says(other, one, "still here"), other.CloseWrite()); err != nil {
		return err
	}
	if n, err := one.Read(make([]byte, 1)); err != io.EOF {
		return fmt.Errorf("read %d, %v at the end, want EOF", n, err)
	}
	return nil
}

func resets(one, other *net.TCPConn) error {
	if err := says(one, other, "hello"); err != nil {
		return err
	}
	reset(one)
	if n, err := other.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("read %d, %v, want ECONNRESET", n, err)
	}
	return nil
}

// much is more than all buffers on the way.
func much(a, b *net.TCPConn) error {
	const size = 4 << 20
	errc := make(chan error, 4)
	for _, d := range [][2]*net.TCPConn{{a, b}, {b, a}} {
		go func() {
			_, err := io.CopyN(d[0], zeros{}, size)
			errc <- errors.Join(err, d[0].CloseWrite())
		}()
		go func() {
			n, err := io.Copy(io.Discard, d[1])
			if n != size {
				err = errors.Join(err, fmt.Errorf("read %d bytes, want %d", n, size))
			}
			errc <- err
		}()
	}
	return errors.Join(<-errc, <-errc, <-errc, <-errc)
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// TestProbesUnderSTRICT has a proxy that refuses plaintext: the node's probes pass,
// whatever else comes in clear text does not.
func TestProbesUnderSTRICT(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		s.carry(t, s.pod, true)
		s.carry(t, s.near, true)
		answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
		s.enrol(t, s.pod, s.near)
		for _, a := range families() {
			to := at(a.pod, 8080)
			s.row(t, a.name+" probe", nil, func() error {
				return s.flow(flow{cg: s.host, ns: s.node.NS, to: to, line: fmt.Sprintf("app %s %s", to, s.nodeProbe(a.pod))})
			})
			s.row(t, a.name+" pod to pod", nil, func() error {
				return s.flow(flow{ns: s.near.NS, to: to, line: fmt.Sprintf("app %s %s", to, a.near)})
			})
			s.row(t, a.name+" stranger", nil, func() error {
				return refused(connect(s.app, s.client.NS, to, nil))
			})
			s.row(t, a.name+" stranger behind the node", nil, func() error {
				// Forwarded by the node, not its own: with an address of the node's network.
				return refused(connect(s.app, s.other.NS, to, nil))
			})
		}
	})
}

// refused expects a reset, which the client may learn from any call after connect.
func refused(c call, err error) error {
	if errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.ENOTCONN) {
		return nil
	}
	return fmt.Errorf("answered %q, %v, want a reset", c.line, err)
}
