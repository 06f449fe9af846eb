package redirect_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// TestSocketKinds has connects that are not one blocking connect of one TCP socket.
func TestSocketKinds(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		s.listenProxy(t)
		answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "client")
		answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
		s.enrol(t)
		for _, a := range families() {
			k := socketKind{to: at(a.client, 8080), loopback: at(a.loopback, 8080), any: a.any}
			for _, tc := range []struct {
				name string
				run  func() error
			}{
				{"MPTCP", k.mptcp},
				{"MPTCP connected again", k.mptcpAgain},
				{"TCP Fast Open", k.fastOpen},
				{"TCP Fast Open at connect", k.fastOpenConnect},
				{"non-blocking", k.nonBlocking},
				{"connected while connecting", k.connectTwice},
				{"connected again elsewhere", k.again},
				{"captured after it was not", k.capturedAgain},
				{"one port, two destinations", k.onePort},
				{"listener after connection", k.listenerAfter},
			} {
				s.row(t, fmt.Sprintf("%s %s", a.name, tc.name), nil, func() error { return in(s.app, s.pod.NS, tc.run) })
			}
		}
	})
}

type socketKind struct {
	to, loopback netip.AddrPort
	any          netip.Addr
}

func (k *socketKind) captured() string { return fmt.Sprintf("15001 %s ", k.to) }

// wantLine reads what the accepting side says and compares what getpeername tells.
func wantLine(fd int, to netip.AddrPort, line string) error {
	peer, err := peerAddr(fd)
	if err != nil || peer != to {
		return fmt.Errorf("getpeername tells %v, %v, want %v", peer, err, to)
	}
	got, err := readAll(fd)
	if err != nil || !strings.HasPrefix(got, line) {
		return fmt.Errorf("connection was answered %q, %v, want %q", got, err, line)
	}
	return nil
}

func connected(fd int, to netip.AddrPort, line string) error {
	if err := dial(fd, to); err != nil {
		return fmt.Errorf("connect to %v: %w", to, err)
	}
	return wantLine(fd, to, line)
}

// with makes the socket and closes it.
func (k *socketKind) with(flags, proto int, f func(fd int) error) error {
	fd, err := stream(k.to.Addr(), flags, proto)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return f(fd)
}

func (k *socketKind) mptcp() error {
	return k.with(0, unix.IPPROTO_MPTCP, func(fd int) error { return connected(fd, k.to, k.captured()) })
}

func (k *socketKind) mptcpAgain() error {
	return k.with(0, unix.IPPROTO_MPTCP, k.twice)
}

func (k *socketKind) again() error { return k.with(0, 0, k.twice) }

func (k *socketKind) twice(fd int) error {
	return errors.Join(connected(fd, k.to, k.captured()), disconnect(fd), connected(fd, k.loopback, "app "))
}

func (k *socketKind) capturedAgain() error {
	return k.with(0, 0, func(fd int) error {
		return errors.Join(connected(fd, k.loopback, "app "), disconnect(fd), connected(fd, k.to, k.captured()))
	})
}

func (k *socketKind) fastOpen() error {
	return k.with(0, 0, func(fd int) error {
		if err := unix.Sendto(fd, []byte("x"), unix.MSG_FASTOPEN, sockaddr(k.to)); err != nil {
			return err
		}
		// sendto may return before the connection is there.
		return errors.Join(ready(fd, unix.POLLOUT), wantLine(fd, k.to, k.captured()))
	})
}

func (k *socketKind) fastOpenConnect() error {
	return k.with(0, 0, func(fd int) error {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1); err != nil {
			return err
		}
		if err := unix.Connect(fd, sockaddr(k.to)); err != nil {
			return err
		}
		if _, err := unix.Write(fd, []byte("x")); err != nil {
			return err
		}
		return errors.Join(ready(fd, unix.POLLOUT), wantLine(fd, k.to, k.captured()))
	})
}

func (k *socketKind) nonBlocking() error {
	return k.with(unix.SOCK_NONBLOCK, 0, func(fd int) error {
		if err := unix.Connect(fd, sockaddr(k.to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return err
		}
		if err := ready(fd, unix.POLLOUT); err != nil {
			return err
		}
		if code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || code != 0 {
			return fmt.Errorf("connection failed: %w, %w", unix.Errno(code), err)
		}
		return errors.Join(ready(fd, unix.POLLIN), unix.SetNonblock(fd, false), wantLine(fd, k.to, k.captured()))
	})
}

// connectTwice asks by connect itself whether a connect has succeeded, as some
// event loops do. The second call passes the hooks again.
func (k *socketKind) connectTwice() error {
	return k.with(unix.SOCK_NONBLOCK, 0, func(fd int) error {
		if err := unix.Connect(fd, sockaddr(k.to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return err
		}
		if err := ready(fd, unix.POLLOUT); err != nil {
			return err
		}
		if err := unix.Connect(fd, sockaddr(k.to)); err != nil && !errors.Is(err, unix.EISCONN) {
			return fmt.Errorf("second connect: %w", err)
		}
		if err := unix.Connect(fd, sockaddr(k.to)); !errors.Is(err, unix.EISCONN) {
			return fmt.Errorf("third connect: %v, want EISCONN", err)
		}
		return errors.Join(ready(fd, unix.POLLIN), unix.SetNonblock(fd, false), wantLine(fd, k.to, k.captured()))
	})
}

// onePort has one bound port for connections to two destinations.
func (k *socketKind) onePort() error {
	other := at(k.to.Addr(), 8081)
	return k.with(0, 0, func(a int) error {
		return k.with(0, 0, func(b int) error {
			for fd, dst := range map[int]netip.AddrPort{a: k.to, b: other} {
				if err := errors.Join(
					unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
					unix.Bind(fd, sockaddr(at(k.any, 33100))),
					dial(fd, dst)); err != nil {
					return fmt.Errorf("connect to %v: %w", dst, err)
				}
			}
			return errors.Join(wantLine(a, k.to, k.captured()), wantLine(b, other, fmt.Sprintf("15001 %s ", other)))
		})
	})
}

// listenerAfter turns a socket that was connected into a listener.
func (k *socketKind) listenerAfter() error {
	return k.with(0, 0, func(fd int) error {
		if err := errors.Join(connected(fd, k.to, k.captured()), disconnect(fd)); err != nil {
			return err
		}
		if err := errors.Join(unix.Bind(fd, sockaddr(at(k.loopback.Addr(), 0))), unix.Listen(fd, 1)); err != nil {
			return err
		}
		me, err := localAddr(fd)
		if err != nil {
			return err
		}
		return k.with(0, 0, func(c int) error {
			if err := dial(c, me); err != nil {
				return err
			}
			from, err := localAddr(c)
			if err != nil {
				return err
			}
			nfd, sa, err := unix.Accept(fd)
			if err != nil {
				return err
			}
			defer unix.Close(nfd)
			if peer, err := peerAddr(nfd); err != nil || peer != from || addrPort(sa) != from {
				return fmt.Errorf("accepted from %v, getpeername tells %v, %v, want %v", addrPort(sa), peer, err, from)
			}
			return nil
		})
	})
}

// ready waits for a socket.
func ready(fd int, events int16) error {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: events}}, 20_000)
		if err == nil && n == 0 {
			return unix.ETIMEDOUT
		}
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// TestSamePortInManyPods has two pods whose apps and proxies listen on the same ports.
func TestSamePortInManyPods(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		for name, h := range map[string]*netlab.Host{"pod": s.pod, "near": s.near} {
			for _, port := range proxyPorts {
				answer(t, listen(t, s.proxy, h.NS, fmt.Sprintf("[::]:%d", port), proxyOptions), fmt.Sprintf("%s's %d", name, port))
			}
			answer(t, listen(t, s.app, h.NS, "[::]:8080", nil), name)
		}
		s.enrol(t, s.pod, s.near)
		for _, a := range families() {
			for _, f := range []flow{
				{name: "pod out", to: at(a.near, 8080), line: fmt.Sprintf("pod's 15001 %s %s", at(a.near, 8080), a.pod)},
				{name: "neighbour out", ns: s.near.NS, to: at(a.pod, 8080), line: fmt.Sprintf("near's 15001 %s %s", at(a.pod, 8080), a.near)},
				{name: "into pod", ns: s.client.NS, to: at(a.pod, 8080), line: fmt.Sprintf("pod's 15006 %s %s", at(a.pod, 8080), a.client)},
				{name: "into neighbour", ns: s.client.NS, to: at(a.near, 8080), line: fmt.Sprintf("near's 15006 %s %s", at(a.near, 8080), a.client)},
				{name: "proxy to proxy", cg: s.proxy, prepare: asProxy, to: at(a.near, redirect.PortHBONE), line: fmt.Sprintf("near's 15008 %s %s", at(a.near, 15008), a.pod)},
				{name: "pod to itself", to: at(a.pod, 8080), line: fmt.Sprintf("pod %s %s", at(a.pod, 8080), a.pod)},
			} {
				s.row(t, a.name+" "+f.name, nil, func() error { return s.flow(f) })
			}
		}
	})
}
