package redirect_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// carry starts a proxy in pod that does what a node proxy does, but for encryption:
//
//	15001  to members' addresses by their 15008 with the destination ahead, else straight
//	15006  to the app, in the client's name
//	15008  to the app, in the name of the client that the first line tells
func (s *stage) carry(t testing.TB, pod *netlab.Host, strict bool) {
	t.Helper()
	p := &carrier{s: s, ns: pod.NS}
	for port, serve := range map[uint16]func(c *net.TCPConn){
		redirect.PortOutbound: p.outbound, redirect.PortInbound: p.plaintext, redirect.PortHBONE: p.tunnelled,
	} {
		if strict && port == redirect.PortInbound {
			serve = func(c *net.TCPConn) { reset(c) }
		}
		accepting(t, listen(t, s.proxy, pod.NS, fmt.Sprintf("[::]:%d", port), proxyOptions), serve)
	}
}

type carrier struct {
	s  *stage
	ns *netns.NS
}

// members' proxies listen on 15008.
var members = map[netip.Addr]bool{podV4: true, podV6: true, nearV4: true, nearV6: true}

// services are virtual addresses.
var services = map[netip.Addr]netip.Addr{vipV4: podV4, vipV6: podV6}

func (p *carrier) outbound(c *net.TCPConn) {
	dst := originalDst(c)
	if a, ok := services[dst.Addr()]; ok {
		dst = at(a, dst.Port())
	}
	if !members[dst.Addr()] {
		p.relay(c, netip.AddrPort{}, dst, "")
		return
	}
	p.relay(c, netip.AddrPort{}, at(dst.Addr(), redirect.PortHBONE), fmt.Sprintf("%s %s\n", dst, remote(c).Addr()))
}

func (p *carrier) plaintext(c *net.TCPConn) { p.relay(c, at(remote(c).Addr(), 0), originalDst(c), "") }

func (p *carrier) tunnelled(c *net.TCPConn) {
	// One byte at a time: what follows the line is the relay's.
	line, err := bufio.NewReaderSize(byteReader{c}, 16).ReadString('\n')
	if err != nil {
		reset(c)
		return
	}
	dst, src, _ := strings.Cut(strings.TrimSpace(line), " ")
	p.relay(c, at(netip.MustParseAddr(src), 0), netip.MustParseAddrPort(dst), "")
}

type byteReader struct{ io.Reader }

func (r byteReader) Read(b []byte) (int, error) { return r.Reader.Read(b[:min(1, len(b))]) }

// relay joins c with a connection to dst, which begins with head.
func (p *carrier) relay(c *net.TCPConn, src, dst netip.AddrPort, head string) {
	d, err := p.dial(src, dst)
	if err != nil {
		reset(c)
		return
	}
	var both sync.WaitGroup
	both.Go(func() {
		_, err := io.WriteString(d, head)
		if err == nil {
			err = pump(d, c)
		}
		if err != nil {
			reset(c)
			reset(d)
		}
	})
	both.Go(func() {
		if err := pump(c, d); err != nil {
			reset(c)
			reset(d)
		}
	})
	both.Wait()
	c.Close()
	d.Close()
}

func pump(to, from *net.TCPConn) error {
	if _, err := io.Copy(to, from); err != nil {
		return err
	}
	return to.CloseWrite()
}

func reset(c *net.TCPConn) {
	_ = c.SetLinger(0) // it may be gone already
	_ = c.Close()
}

// dial makes its socket in the proxy's cgroup; what happens to it later may happen
// on any thread.
func (p *carrier) dial(src, dst netip.AddrPort) (*net.TCPConn, error) {
	if src.Addr() == dst.Addr() {
		src = netip.AddrPort{}
	}
	var fd int
	if err := in(p.s.proxy, p.ns, func() (err error) { fd, err = stream(dst.Addr(), unix.SOCK_NONBLOCK, 0); return err }); err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "dial")
	defer f.Close()
	err := asProxy(fd)
	if err == nil && src.IsValid() {
		err = unix.Bind(fd, sockaddr(src))
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, sockaddr(dst)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return nil, err
	}
	if err := ready(fd, unix.POLLOUT); err != nil {
		return nil, err
	}
	if code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || code != 0 {
		return nil, errors.Join(err, syscall.Errno(code))
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// dialAs connects as an app does, for Go's use.
func dialAs(ctx context.Context, cg *netlab.Cgroup, ns *netns.NS, to netip.AddrPort) (*net.TCPConn, error) {
	var c net.Conn
	err := in(cg, ns, func() error {
		fd, err := stream(to.Addr(), 0, 0)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), "app")
		defer f.Close()
		if err := dial(fd, to); err != nil {
			return err
		}
		if err := unix.SetNonblock(fd, true); err != nil {
			return err
		}
		c, err = net.FileConn(f)
		return err
	})
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}
