package redirect_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// Processes of a stage are threads: a socket belongs to the namespace and the
// cgroup of the thread that makes it, whoever uses it later.

func parent(cgroup string) string { return filepath.Dir(cgroup) }

// in runs f on a thread of cg inside ns: for calls that make sockets and may wait.
// Without a cgroup it is the test's own.
func in(cg *netlab.Cgroup, ns *netns.NS, f func() error) error {
	if cg != nil {
		return cg.Do(func() error { return within(ns, f) })
	}
	donec := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := within(ns, f)
		if err == nil {
			runtime.UnlockOSThread()
		}
		donec <- err // on error the thread ends: nobody knows where it is
	}()
	return <-donec
}

func within(ns *netns.NS, f func() error) error {
	home, err := netns.Current()
	if err != nil {
		return err
	}
	defer home.Close()
	if err := unix.Setns(ns.FD(), unix.CLONE_NEWNET); err != nil {
		return err
	}
	return errors.Join(f(), unix.Setns(home.FD(), unix.CLONE_NEWNET))
}

// containerCaps are those that container runtimes give by default.
var containerCaps = []int{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID, unix.CAP_KILL, unix.CAP_SETGID, unix.CAP_SETUID,
	unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE, unix.CAP_NET_RAW, unix.CAP_SYS_CHROOT, unix.CAP_MKNOD, unix.CAP_AUDIT_WRITE,
	unix.CAP_SETFCAP,
}

// contained runs f as a container of the pod would: root, with a container's default
// capabilities, on one CPU, so that packets keep their order.
func contained(cg *netlab.Cgroup, ns *netns.NS, f func() error) error {
	return apart(cg, ns, func() error {
		var set unix.CPUSet
		if err := unix.SchedGetaffinity(0, &set); err != nil {
			return err
		}
		for i, one := 0, false; i < 1024; i++ {
			if set.IsSet(i) && one {
				set.Clear(i)
			}
			one = one || set.IsSet(i)
		}
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return err
		}
		var data [2]unix.CapUserData
		for _, c := range containerCaps {
			data[c/32].Permitted |= 1 << (c % 32)
			data[c/32].Effective |= 1 << (c % 32)
		}
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
			return fmt.Errorf("drop capabilities: %w", err)
		}
		return f()
	})
}

// apart runs f on a thread of its own, which ends with f whatever it was made.
func apart(cg *netlab.Cgroup, ns *netns.NS, f func() error) error {
	donec, tidc := make(chan error, 1), make(chan int, 1)
	go func() {
		runtime.LockOSThread()
		tidc <- unix.Gettid()
		if cg != nil {
			if err := enter(cg.Path); err != nil {
				donec <- err
				return
			}
		}
		err := unix.Setns(ns.FD(), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		donec <- err
	}()
	err, tid := <-donec, <-tidc
	// A cgroup with a thread in it cannot be removed, not even with one that is ending.
	for !errors.Is(unix.Tgkill(os.Getpid(), tid, 0), unix.ESRCH) {
		runtime.Gosched()
	}
	return err
}

// enter moves the calling thread.
func enter(cgroup string) error {
	return os.WriteFile(filepath.Join(cgroup, "cgroup.threads"), []byte(strconv.Itoa(unix.Gettid())), 0)
}

// listen makes a TCP listener in cg and ns.
func listen(t testing.TB, cg *netlab.Cgroup, ns *netns.NS, addr string, control func(string, string, syscall.RawConn) error) net.Listener {
	t.Helper()
	ln, err := tryListen(t, cg, ns, addr, control)
	check(t, err)
	return ln
}

func tryListen(t testing.TB, cg *netlab.Cgroup, ns *netns.NS, addr string, control func(string, string, syscall.RawConn) error) (ln net.Listener, err error) {
	err = in(cg, ns, func() (err error) {
		lc := &net.ListenConfig{Control: control}
		lc.SetMultipathTCP(false)
		network := "tcp"
		if a, perr := netip.ParseAddrPort(addr); perr == nil && a.Addr().Is4() {
			network = "tcp4"
		}
		ln, err = lc.Listen(t.Context(), network, addr)
		return err
	})
	return ln, err
}

// packetConn makes a UDP socket that ends with the test.
func packetConn(t *testing.T, cg *netlab.Cgroup, ns *netns.NS, addr netip.AddrPort) (pc *net.UDPConn) {
	t.Helper()
	check(t, in(cg, ns, func() (err error) {
		pc, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
		return err
	}))
	t.Cleanup(func() { pc.Close() })
	check(t, pc.SetReadDeadline(deadline()))
	return pc
}

// call is what an app sees of a connection.
type call struct {
	local, peer netip.AddrPort
	line        string
}

// connect opens a connection as a process of cg would, without Go's dialer, whose
// goroutines run on any thread.
func connect(cg *netlab.Cgroup, ns *netns.NS, to netip.AddrPort, prepare func(fd int) error) (c call, err error) {
	err = in(cg, ns, func() error {
		c, err = connectHere(to, prepare)
		return err
	})
	return c, err
}

// connectHere is connect on the caller's thread.
func connectHere(to netip.AddrPort, prepare func(fd int) error) (c call, err error) {
	fd, err := stream(to.Addr(), 0, 0)
	if err != nil {
		return c, err
	}
	defer unix.Close(fd)
	if prepare != nil {
		if err := prepare(fd); err != nil {
			return c, err
		}
	}
	if err := dial(fd, to); err != nil {
		return c, err
	}
	if c.local, err = localAddr(fd); err != nil {
		return c, err
	}
	if c.peer, err = peerAddr(fd); err != nil {
		return c, err
	}
	c.line, err = readAll(fd)
	return c, err
}

// stream makes a TCP socket for to that waits twenty seconds at most.
func stream(to netip.Addr, flags, proto int) (int, error) {
	family := unix.AF_INET
	if to.Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|flags, proto)
	if err != nil {
		return -1, err
	}
	return fd, patience(fd)
}

// dial is connect(2) that goes on after a signal: the runtime sends some.
func dial(fd int, to netip.AddrPort) error {
	err := unix.Connect(fd, sockaddr(to))
	if !errors.Is(err, unix.EINTR) {
		return err
	}
	if err := ready(fd, unix.POLLOUT); err != nil {
		return err
	}
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && code != 0 {
		err = unix.Errno(code)
	}
	return err
}

// read is read(2) that goes on after a signal, as a socket with a time-out does not by itself.
func read(fd int, b []byte) (n int, err error) {
	for {
		if n, err = unix.Read(fd, b); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// recvfrom is read for datagrams.
func recvfrom(fd int, b []byte) (n int, from unix.Sockaddr, err error) {
	for {
		if n, from, err = unix.Recvfrom(fd, b, 0); !errors.Is(err, unix.EINTR) {
			return n, from, err
		}
	}
}

func patience(fd int) error {
	tv := unix.Timeval{Sec: 20}
	return errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv))
}

// impatient makes a connect that will come to nothing fail soon.
func impatient(fd int) error {
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Usec: 150_000})
}

func readAll(fd int) (line string, err error) {
	b := make([]byte, 256)
	for {
		n, err := read(fd, b)
		if err != nil || n == 0 {
			return line, err
		}
		line += string(b[:n])
	}
}

func localAddr(fd int) (netip.AddrPort, error) {
	sa, err := unix.Getsockname(fd)
	return addrPort(sa), err
}

func peerAddr(fd int) (netip.AddrPort, error) {
	sa, err := unix.Getpeername(fd)
	return addrPort(sa), err
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func bindTo(a netip.AddrPort) func(int) error {
	return func(fd int) error { return unix.Bind(fd, sockaddr(a)) }
}

// disconnect is connect(2) to AF_UNSPEC, which x/sys has no type for.
func disconnect(fd int) error {
	var sa unix.RawSockaddr
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa))
	if errno != 0 {
		return fmt.Errorf("disconnect: %w", errno)
	}
	return nil
}

// listenerOf wraps a listening socket and owns it.
func listenerOf(t testing.TB, fd int) net.Listener {
	t.Helper()
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	ln, err := net.FileListener(f)
	check(t, err)
	return ln
}
