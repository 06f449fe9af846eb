package netns

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/net/nettest"
	"golang.org/x/sys/unix"
)

func takenOver(t testing.TB, network, addr string) *Listener {
	t.Helper()
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Skipf("the kernel has no such address: %v", err)
	}
	l, err := NewListener(ln)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// each accepts until the listener is closed.
func each(t *testing.T, l *Listener) <-chan *Conn {
	t.Helper()
	connc := make(chan *Conn, 64)
	go func() {
		defer close(connc)
		if err := l.Each(func(c *Conn) { connc <- c }); !errors.Is(err, net.ErrClosed) {
			t.Errorf("accepting ended with %v, want net.ErrClosed", err)
		}
	}()
	return connc
}

func TestListenerMakesNetConns(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		l := takenOver(t, "tcp4", "127.0.0.1:0")
		connc := each(t, l)
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return nil, nil, nil, err
		}
		a := <-connc
		return a, c, func() { _, _, _ = a.Close(), c.Close(), l.Close() }, nil
	})
}

// Addresses are those of the net package's listeners; IPv4 through IPv6 is IPv4.
func TestListenerKnowsAddresses(t *testing.T) {
	for _, tc := range []struct{ name, network, listen, dial string }{
		{"v4", "tcp4", "127.0.0.1:0", "127.0.0.1"},
		{"v6", "tcp6", "[::1]:0", "::1"},
		{"dual stack over v4", "tcp", "[::]:0", "127.0.0.1"},
		{"dual stack over v6", "tcp", "[::]:0", "::1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := takenOver(t, tc.network, tc.listen)
			connc := each(t, l)
			to := netip.AddrPortFrom(netip.MustParseAddr(tc.dial), l.Addr().(*net.TCPAddr).AddrPort().Port())
			c, err := net.Dial("tcp", to.String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			a := <-connc
			defer a.Close()
			from := c.LocalAddr().(*net.TCPAddr).AddrPort()
			if a.RemoteAddrPort() != from || a.LocalAddrPort() != to {
				t.Errorf("accepted %v at %v, want %v at %v", a.RemoteAddrPort(), a.LocalAddrPort(), from, to)
			}
			if a.RemoteAddr().String() != from.String() || a.LocalAddr().String() != to.String() {
				t.Errorf("accepted %v at %v, want %v at %v", a.RemoteAddr(), a.LocalAddr(), from, to)
			}
		})
	}
}

// Of a connection that is closed before anybody asks, the local address is not known, and nothing else is.
func TestLocalAddressOfWhatIsClosed(t *testing.T) {
	l := takenOver(t, "tcp4", "127.0.0.1:0")
	connc := each(t, l)
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	a := <-connc
	_ = a.Close()
	if ap := a.LocalAddrPort(); ap.IsValid() {
		t.Errorf("closed, and yet at %v", ap)
	}
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// What is accepted lingers as its listener does, and setting that again costs no call.
func TestAcceptedInheritLingering(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := ln.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		err = unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := NewListener(ln)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	connc := each(t, l)
	for _, set := range [][]int{nil, {0}, {-1, 0}} {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		a := <-connc
		for _, sec := range set {
			if err := a.SetLinger(sec); err != nil {
				t.Error(err)
			}
		}
		_ = a.Close()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("after SetLinger %v: %v, want a reset", set, err)
		}
		_ = c.Close()
	}
}

// A crowd that is there already is accepted, all of it, by one call.
func TestListenerTakesCrowds(t *testing.T) {
	l := takenOver(t, "tcp4", "127.0.0.1:0")
	const n = 3*acceptTurn + 1
	for range n {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	connc := each(t, l)
	for range n {
		_ = (<-connc).Close()
	}
}

// Close ends accepting, whoever waits, whoever is being accepted.
func TestListenerClosesUnderLoad(t *testing.T) {
	l := takenOver(t, "tcp4", "127.0.0.1:0")
	var wg sync.WaitGroup
	begunc := make(chan struct{})
	var once sync.Once
	wg.Go(func() {
		if err := l.Each(func(c *Conn) { once.Do(func() { close(begunc) }); _ = c.Close() }); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	for range 4 {
		wg.Go(func() {
			for {
				c, err := net.Dial("tcp", l.Addr().String())
				if err != nil {
					return // closed: nobody listens
				}
				_ = c.Close()
			}
		})
	}
	<-begunc
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
	if err := l.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed twice: %v", err)
	}
	if err := l.Each(func(*Conn) {}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after Close: %v", err)
	}
}

// Without descriptors accepting fails and does not spin; with some again it goes on.
func TestListenerWithoutDescriptors(t *testing.T) {
	l := takenOver(t, "tcp4", "127.0.0.1:0")
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	none := was
	none.Cur = 1 // what is open stays so
	if err := syscall.Setrlimit(unix.RLIMIT_NOFILE, (*syscall.Rlimit)(&none)); err != nil {
		t.Skip(err)
	}
	err = l.Each(func(c *Conn) { t.Error("accepted without a descriptor"); _ = c.Close() })
	if rerr := syscall.Setrlimit(unix.RLIMIT_NOFILE, (*syscall.Rlimit)(&was)); rerr != nil {
		t.Fatal(rerr)
	}
	if !errors.Is(err, syscall.EMFILE) {
		t.Errorf("%v, want EMFILE", err)
	}
	_ = (<-each(t, l)).Close()
}

// No such thing is taken over, and none is left behind.
func TestListenerOfAnotherKind(t *testing.T) {
	ln, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewListener(ln); err == nil {
		t.Error("a listener of a Unix socket was taken over")
	}
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("it goes on listening: %v", err)
	}
}
