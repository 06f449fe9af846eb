package sockdiag

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/test/leak"
	"github.com/ambit-mesh/ambit/test/netlab"
)

func TestMain(m *testing.M) { leak.Main(m) }

func TestDestroyConnection(t *testing.T) {
	pod := netlab.MustHost(t, "pod")
	if err := CanDestroy(); err != nil {
		t.Fatal(err)
	}
	ln, err := pod.NS.Listen(t.Context(), &net.ListenConfig{}, "tcp", "[::]:0") // IPv4 in an IPv6 socket
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, known := range []bool{false, true} {
		c, err := pod.NS.Dial(t.Context(), &net.Dialer{}, "tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), ln.Addr().(*net.TCPAddr).AddrPort().Port()).String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		local := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), c.RemoteAddr().(*net.TCPAddr).AddrPort().Port())
		remote := netip.AddrPortFrom(local.Addr(), c.LocalAddr().(*net.TCPAddr).AddrPort().Port())
		cookie := uint64(0)
		if known {
			all, err := List(pod.NS, Connections)
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(all, func(s Socket) bool { return s.Local == local && s.Remote == remote })
			cookie = all[i].Cookie
		}
		if err := DestroyConnection(pod.NS, local, remote, cookie); err != nil {
			t.Fatalf("by number: %t: %v", known, err)
		}
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
			t.Errorf("the socket's owner was told %v, want ECONNABORTED", err)
		}
		if err := DestroyConnection(pod.NS, local, remote, cookie); !errors.Is(err, ErrNoSocket) {
			t.Errorf("again: %v, want ErrNoSocket", err)
		}
	}
}

func TestListAndDestroy(t *testing.T) {
	pod := netlab.MustHost(t, "pod")
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"} {
		t.Run(addr, func(t *testing.T) {
			a := netip.MustParseAddrPort(addr)
			if a.Addr().Is6() && !netlab.IPv6() {
				t.Skip("needs IPv6")
			}
			ln, err := pod.NS.Listen(t.Context(), &net.ListenConfig{}, "tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), ln.Addr().(*net.TCPAddr).AddrPort().Port())
			if a.Addr() == netip.IPv6Loopback() {
				to = netip.AddrPortFrom(netip.IPv6Loopback(), to.Port())
			}
			c, err := pod.NS.Dial(t.Context(), &net.Dialer{}, "tcp", to.String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			s, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			all, err := List(pod.NS, Connections)
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(all, func(s Socket) bool { return s.Local == to })
			if i < 0 || all[i].Remote.String() != c.LocalAddr().String() || all[i].State != Established || all[i].Inode == 0 || all[i].Cookie == 0 {
				t.Fatalf("sockets are %+v, want one from %v to %v", all, to, c.LocalAddr())
			}
			if err := DestroyConnection(pod.NS, all[i].Local, all[i].Remote, all[i].Cookie+1); !errors.Is(err, ErrNoSocket) {
				t.Errorf("another socket with these addresses: %v, want ErrNoSocket", err)
			}
			n, err := Destroy(pod.NS, all[i:i+1])
			if err != nil || n != 1 {
				t.Fatalf("reset %d, %v", n, err)
			}
			if _, err := s.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
				t.Errorf("the socket's owner was told %v, want ECONNABORTED", err)
			}
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the peer was told %v, want ECONNRESET", err)
			}
			if n, err := Destroy(pod.NS, all[i:i+1]); err != nil || n != 0 {
				t.Errorf("reset again: %d, %v", n, err)
			}
		})
	}
	listeners, err := List(pod.NS, Of(Listen))
	if err != nil || len(listeners) != 0 {
		t.Errorf("listeners are %v, %v, want none", listeners, err)
	}
}

// message is one netlink message.
func message(kind uint16, body []byte) []byte {
	b := make([]byte, headerLen, headerLen+len(body))
	binary.NativeEndian.PutUint32(b, uint32(headerLen+len(body)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	return append(b, body...)
}

func TestParse(t *testing.T) {
	errno := func(n int32) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(n)) }
	socket := make([]byte, msgLen)
	socket[0], socket[1] = unix.AF_INET, byte(CloseWait)
	copy(socket[4:], []byte{0x1f, 0x90, 0, 80})
	copy(socket[8:], []byte{10, 0, 0, 1})
	copy(socket[24:], []byte{10, 0, 0, 2})
	for _, tc := range []struct {
		name string
		in   []byte
		done bool
		err  error
		n    int
	}{
		{name: "nothing"},
		{name: "done", in: message(unix.NLMSG_DONE, errno(0)), done: true},
		{name: "done without number", in: message(unix.NLMSG_DONE, nil), done: true},
		{name: "failed", in: message(unix.NLMSG_ERROR, errno(-int32(unix.EPERM))), done: true, err: unix.EPERM},
		{name: "two sockets", in: bytes.Repeat(message(sockDiagByFamily, socket), 2), n: 2},
		{name: "short socket", in: message(sockDiagByFamily, socket[:40]), done: true, err: errMalformed},
		{name: "attribute too long", in: message(sockDiagByFamily, append(slices.Clone(socket), 9, 0, 15, 0)), done: true, err: errMalformed},
		{name: "length too small", in: make([]byte, headerLen), done: true, err: errMalformed},
		{name: "cut off", in: message(sockDiagByFamily, socket)[:30], done: true, err: errMalformed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			all, done, err := parse(nil, tc.in)
			if done != tc.done || !errors.Is(err, tc.err) || len(all) != tc.n {
				t.Fatalf("%d sockets, done %t, %v; want %d, %t, %v", len(all), done, err, tc.n, tc.done, tc.err)
			}
			for _, s := range all {
				if s.Local.String() != "10.0.0.1:8080" || s.Remote.String() != "10.0.0.2:80" || s.State != CloseWait {
					t.Errorf("socket is %+v", s)
				}
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add(message(unix.NLMSG_DONE, nil))
	f.Add(message(sockDiagByFamily, append(make([]byte, msgLen), 8, 0, attrMark, 0, 1, 2, 3, 4, 12, 0, attrCgroup, 0, 1, 2, 3, 4, 5, 6, 7, 8)))
	storage := appendAttr(appendAttr(nil, attrMapID, []byte{1, 0, 0, 0}), attrMapValue, []byte("value"))
	f.Add(message(sockDiagByFamily, appendAttr(appendAttr(make([]byte, msgLen), attrInfo, make([]byte, 136)), attrStorages, appendAttr(nil, attrStorage, storage))))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, done, err := parse(nil, b)
		if err != nil && !done {
			t.Error("a failure that is not the end")
		}
		if len(all) > len(b)/msgLen {
			t.Errorf("%d sockets from %d bytes", len(all), len(b))
		}
		_, _ = parseMessages(b, func(body []byte) error { _, err := parseDetail(body); return err })
	})
}
