package origin

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// lab is a pod whose connections programs capture.
type lab struct {
	t        *testing.T
	pod      *netlab.Host
	app      *netlab.Cgroup
	listener *net.TCPListener // of the proxy
}

func newLab(t *testing.T) *lab {
	t.Helper()
	cg := netlab.MustCgroups(t, "pods", "proxy")
	l := &lab{t: t, pod: netlab.MustHost(t, "pod"), app: cg[0]}
	node, p := netlab.MustHost(t, "node"), netip.MustParsePrefix
	must(t, netlab.Cable(l.pod, "eth0", node, "pod"), l.pod.Up("eth0"), node.Up("pod"),
		l.pod.Addr("eth0", p("10.8.0.2/24")), node.Addr("pod", p("10.8.0.1/24")),
		l.pod.Route(netlab.Route{Dst: p("0.0.0.0/0"), Via: netip.MustParseAddr("10.8.0.1")}))
	if netlab.IPv6() {
		must(t, l.pod.Addr("eth0", p("fd00:8::2/64")), node.Addr("pod", p("fd00:8::1/64")),
			l.pod.Route(netlab.Route{Dst: p("::/0"), Via: netip.MustParseAddr("fd00:8::1")}))
	}
	h, err := redirect.OpenHooks(redirect.HooksConfig{CgroupRoot: filepath.Dir(l.app.Path), Dir: netlab.MustBPFFS(t), Node: node.NS})
	must(t, err)
	t.Cleanup(func() { must(t, h.Uninstall(), h.Close()) })
	must(t, h.Proxy(cg[1].Path), h.Ready())
	must(t, l.in(cg[1], "proxy", func() error {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		ln, err := lc.Listen(t.Context(), "tcp", "[::]:15001")
		if err == nil {
			l.listener = ln.(*net.TCPListener)
		}
		return err
	}))
	t.Cleanup(func() { l.listener.Close() })
	must(t, l.listener.SetDeadline(time.Now().Add(60*time.Second)), h.Apply(l.pod.NS, redirect.PodRules{IPv6: netlab.IPv6()}))
	return l
}

// in runs f on a thread of cg in the pod, which ends with f.
func (l *lab) in(cg *netlab.Cgroup, name string, f func() error) error {
	donec := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocks: nothing is to be undone
		donec <- func() error {
			if err := errors.Join(
				os.WriteFile(filepath.Join(cg.Path, "cgroup.threads"), []byte(strconv.Itoa(unix.Gettid())), 0o644),
				os.WriteFile("/proc/thread-self/comm", []byte(name), 0o644), unix.Setns(l.pod.NS.FD(), unix.CLONE_NEWNET)); err != nil {
				return err
			}
			return f()
		}()
	}()
	return <-donec
}

func sockaddr(a netip.AddrPort) (unix.Sockaddr, int) {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}, unix.AF_INET
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}, unix.AF_INET6
}

// TestWhoOpenedAConnection has sockets of each kind; the proxy is told who
// connected, whatever the socket is like.
func TestWhoOpenedAConnection(t *testing.T) {
	l := newLab(t)
	var st unix.Stat_t
	must(t, unix.Stat(l.app.Path, &st))
	connect := func(fd int, sa unix.Sockaddr) error { return unix.Connect(fd, sa) }
	for _, tc := range []struct {
		name, to, comm string
		flags          int
		connect        func(fd int, sa unix.Sockaddr) error
	}{
		{"IPv4", "10.9.0.1:80", "curl", 0, connect},
		{"IPv6", "[fd00:9::1]:80", "fifteen-letters", 0, connect},
		{"IPv4 in an IPv6 socket", "[::ffff:10.9.0.1]:80", "a b\"\x1b", 0, connect},
		{"non-blocking", "10.9.0.1:80", "async", unix.SOCK_NONBLOCK, func(fd int, sa unix.Sockaddr) error {
			if err := unix.Connect(fd, sa); !errors.Is(err, unix.EINPROGRESS) {
				return err
			}
			return nil
		}},
		{"TCP Fast Open", "10.9.0.1:80", "fast", 0, func(fd int, sa unix.Sockaddr) error {
			return unix.Sendto(fd, []byte("x"), unix.MSG_FASTOPEN, sa)
		}},
		{"connected later", "10.9.0.1:80", "later", 0, func(fd int, sa unix.Sockaddr) error {
			on := 1 // TCP_FASTOPEN_CONNECT: connect(2) returns at once, the first write connects
			if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, on); err != nil {
				return err
			}
			if err := unix.Connect(fd, sa); err != nil {
				return err
			}
			_, err := unix.Write(fd, []byte("x"))
			return err
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sa, family := sockaddr(netip.MustParseAddrPort(tc.to))
			if family == unix.AF_INET6 && !netlab.IPv6() {
				t.Skip("needs IPv6")
			}
			fd := -1
			must(t, l.in(l.app, tc.comm, func() (err error) {
				if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|tc.flags, 0); err != nil {
					return err
				}
				return tc.connect(fd, sa)
			}))
			defer unix.Close(fd)
			c, err := l.listener.AcceptTCP()
			must(t, err)
			defer c.Close()
			var r Reader
			var o Origin
			r.Read(c, &o)
			want := Origin{PID: uint32(os.Getpid()), Cgroup: st.Ino}
			copy(want.Comm[:], tc.comm)
			if o != want {
				t.Errorf("opened by %+v, want %+v", o, want)
			}
			if dst, err := sockopt.OriginalDst(c); err != nil || netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port()).String() != strings.Replace(tc.to, "[::ffff:10.9.0.1]", "10.9.0.1", 1) {
				t.Errorf("destination %v, %v", dst, err)
			}
			// The app is told nothing, about itself or others.
			if _, err := unix.GetsockoptInt(fd, unix.SOL_IP, 0x4d657368); !errors.Is(err, unix.ENOPROTOOPT) {
				t.Errorf("the app asks who it is: %v", err)
			}
			n := New(Config{})
			if n.hasPID {
				n.Note(o)
				n.learn(<-n.queue)
				exe, err := os.Executable()
				must(t, err)
				if name, container := n.Of(o); name != filepath.Base(exe) || container != "" {
					t.Errorf("executable %q in container %q, want %q", name, container, filepath.Base(exe))
				}
			}
		})
	}
}
