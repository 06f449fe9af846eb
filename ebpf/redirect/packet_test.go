package redirect_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// The attacks below are those of a container with default capabilities that writes
// packets itself. What has to be held back is a SYN, however wrapped: no TCP
// connection begins without one.

// frame is one packet as a container sends it.
type frame struct {
	name   string
	bytes  []byte // from the Ethernet type on, or the IP header if proto is set
	proto  uint16
	raw    func(mark []byte) error // instead: a raw socket
	limits limits
}

func TestPacketsPastTheHooks(t *testing.T) {
	forAll(t, func(t *testing.T, s *stage) {
		w := s.watch(t)
		frames := 0
		send := func(f func(mark []byte) frame) (arrived bool, err error) {
			frames++
			mark := binary.BigEndian.AppendUint32(nil, 0x5eed0000+uint32(frames))
			fr := f(mark)
			err = contained(s.app, s.pod.NS, func() error {
				if err := fr.send(w, mark); err != nil {
					return err
				}
				return w.last(mark)
			})
			if err != nil {
				return false, err
			}
			return w.saw(mark)
		}
		rows := packetRows()
		for _, row := range rows {
			if arrived, err := send(row); err != nil || !arrived {
				t.Errorf("%s does not arrive without a mesh, so its row proves nothing: %v", row(nil).name, err)
			}
		}
		s.listenProxy(t)
		s.enrol(t)
		for _, row := range rows {
			fr := row(make([]byte, 4))
			s.row(t, fr.name, fr.limits, func() error {
				arrived, err := send(row)
				if arrived {
					return errors.New("the SYN reached the other node")
				}
				return err
			})
		}
	})
}

// TestHooksGateInThePodAlone has no gate at the node's end, as where the pod's cable
// is none of the kinds that are known. What goes through the pod's queue is told as
// something else than IP.
func TestHooksGateInThePodAlone(t *testing.T) {
	s := quietStage(t)
	s.cfg.Node = nil
	s.open(t)
	t.Cleanup(func() { check(t, s.hooks.Uninstall(), s.hooks.Close()) })
	w := s.watch(t)
	w.queue = true
	s.listenProxy(t)
	s.enrol(t)
	for i, row := range packetRows() {
		mark := binary.BigEndian.AppendUint32(nil, 0x6eed0000+uint32(i))
		fr := row(mark)
		s.row(t, fr.name, fr.limits, func() error {
			if err := contained(s.app, s.pod.NS, func() error { return both(fr.send(w, mark), w.last(mark)) }); err != nil {
				return err
			}
			if arrived, err := w.saw(mark); err != nil || arrived {
				return fmt.Errorf("the SYN reached the other node: %v, %w", arrived, err)
			}
			return nil
		})
	}
}

func packetRows() []func(mark []byte) frame {
	v4 := func(proto byte, payload []byte) []byte { return ip4(podV4, clientV4, proto, 0, payload) }
	v6 := func(next byte, payload []byte) []byte { return ip6(podV6, clientV6, next, payload) }
	byPacket := limits{byRules: redirect.LimitPacket, byMarks: redirect.LimitPacket}
	wrapped := limits{byRules: redirect.LimitPacket, byMarks: redirect.LimitPacket, byHooks: redirect.LimitTunnel}
	rawSocket := func(name string, to netip.Addr, limits limits, prepare func(int) error) func([]byte) frame {
		return func([]byte) frame {
			return frame{name: name, limits: limits, raw: func(mark []byte) error { return sendRaw(to, syn(mark), prepare) }}
		}
	}
	marked := func(mark int) func(int) error {
		return func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark) }
	}
	rows := []func([]byte) frame{
		rawSocket("raw socket", clientV4, nil, nil),
		rawSocket("raw socket with the proxy's mark", clientV4, limits{byMarks: redirect.LimitMark}, marked(redirect.MarkProxy)),
		func(m []byte) frame {
			return frame{name: "raw socket with a header of its own", raw: func(m []byte) error {
				return sendRaw(clientV4, ip4(nearV4, clientV4, unix.IPPROTO_TCP, 0, syn(m)), func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_HDRINCL, 1) })
			}}
		},
		func(m []byte) frame {
			return frame{name: "packet socket", bytes: v4(6, syn(m)), proto: unix.ETH_P_IP, limits: byPacket}
		},
		func(m []byte) frame {
			return frame{name: "packet socket past the queue", bytes: ether(unix.ETH_P_IP, v4(6, syn(m))), limits: byPacket}
		},
		func(m []byte) frame {
			return frame{name: "IPv4 options", bytes: ether(unix.ETH_P_IP, ip4options(podV4, clientV4, 6, syn(m))), limits: byPacket}
		},
		func(m []byte) frame {
			return frame{name: "another pod's address", bytes: ether(unix.ETH_P_IP, ip4(nearV4, clientV4, 6, 0, syn(m))), limits: byPacket}
		},
		func(m []byte) frame {
			return frame{name: "fragment without flags", bytes: ether(unix.ETH_P_IP, ip4(podV4, clientV4, 6, 0x2000, syn(m)[:8]))}
		},
		func(m []byte) frame {
			return frame{name: "fragment without flags, others behind it", bytes: padded(ether(unix.ETH_P_IP, ip4(podV4, clientV4, 6, 0x2000, syn(m)[:8])), m, 8)}
		},
		func(m []byte) frame {
			return frame{name: "fragment of IPv4 in IPv4, flags behind it",
				bytes: padded(ether(unix.ETH_P_IP, ip4(podV4, clientV4, 4, 0x2000, v4(6, syn(m))[:32])), m, 12)}
		},
		func(m []byte) frame {
			return frame{name: "fragment with flags only", bytes: ether(unix.ETH_P_IP, ip4(podV4, clientV4, 6, 1, syn(m)[8:])), limits: byPacket}
		},
		func(m []byte) frame { // over the ports and flags of one that came before
			return frame{name: "fragment of IPv4 in IPv4 with flags only", bytes: ether(unix.ETH_P_IP, ip4(podV4, clientV4, 4, 3, append(v4(6, syn(m))[24:], m...)))}
		},
		func(m []byte) frame {
			return frame{name: "fragment of IPv6 in IPv4 with flags only", bytes: ether(unix.ETH_P_IP, ip4(podV4, clientV4, 41, 6, append(v6(6, syn(m))[48:], m...)))}
		},
		func(m []byte) frame {
			return frame{name: "first of two fragments", bytes: ether(unix.ETH_P_IP, ip4(podV4, clientV4, 6, 0x2000, append(syn(m), 0, 0, 0, 0)))}
		},
		func(m []byte) frame {
			return frame{name: "VLAN tag of priority only", bytes: vlan(ether(unix.ETH_P_IP, v4(6, syn(m)))), limits: byPacket}
		},
		func(m []byte) frame {
			return frame{name: "two VLAN tags", bytes: vlan(vlan(ether(unix.ETH_P_IP, v4(6, syn(m))))), limits: byPacket}
		},
		func(m []byte) frame {
			return frame{name: "three VLAN tags", bytes: vlan(vlan(vlan(ether(unix.ETH_P_IP, v4(6, syn(m)))))), limits: byPacket}
		},
		func(m []byte) frame {
			return frame{name: "IPv4 in IPv4", bytes: ether(unix.ETH_P_IP, v4(4, ip4(podV4, clientV4, 6, 0, syn(m)))), limits: byPacket}
		},
		func(m []byte) frame {
			return frame{name: "IPv4 in IPv4 in IPv4", bytes: ether(unix.ETH_P_IP, v4(4, v4(4, v4(6, syn(m))))), limits: byPacket}
		},
		func(m []byte) frame {
			return frame{name: "IPv4 in GRE", bytes: ether(unix.ETH_P_IP, v4(47, append([]byte{0, 0, 8, 0}, v4(6, syn(m))...))), limits: wrapped}
		},
		func(m []byte) frame {
			return frame{name: "Ethernet in VXLAN", limits: wrapped,
				bytes: ether(unix.ETH_P_IP, v4(17, slices.Concat([]byte{0x80, 1, 0x12, 0xb5, 0, 70, 0, 0, 8, 0, 0, 0, 0, 0, 1, 0}, make([]byte, 12), ether(unix.ETH_P_IP, v4(6, syn(m))))))}
		},
	}
	if !everything.IPv6 {
		return rows
	}
	ext := func(next byte, payload []byte) []byte { return append([]byte{next, 0, 1, 4, 0, 0, 0, 0}, payload...) }
	for _, x := range []struct {
		name string
		make func(m []byte) []byte
	}{
		{"packet socket", func(m []byte) []byte { return v6(6, syn(m)) }},
		{"another pod's address", func(m []byte) []byte { return ip6(nearV6, clientV6, 6, syn(m)) }},
		{"destination options", func(m []byte) []byte { return v6(60, ext(6, syn(m))) }},
		{"hop-by-hop options", func(m []byte) []byte { return v6(0, ext(6, syn(m))) }},
		{"five extensions", func(m []byte) []byte { return v6(60, ext(60, ext(60, ext(60, ext(60, ext(6, syn(m))))))) }},
		{"seven extensions", func(m []byte) []byte {
			return v6(60, ext(60, ext(60, ext(60, ext(60, ext(60, ext(60, ext(6, syn(m)))))))))
		}},
		{"atomic fragment", func(m []byte) []byte { return v6(44, append([]byte{6, 0, 0, 0, 0, 0, 0, 9}, syn(m)...)) }},
		{"fragment without flags", func(m []byte) []byte { return v6(44, append([]byte{6, 0, 0, 1, 0, 0, 0, 9}, syn(m)[:8]...)) }},
		{"fragment without flags, others behind it", func(m []byte) []byte {
			return padded(v6(44, append([]byte{6, 0, 0, 1, 0, 0, 0, 9}, syn(m)[:8]...)), m, 8)
		}},
		{"fragment with extensions only", func(m []byte) []byte {
			return v6(44, slices.Concat([]byte{60, 0, 0, 1, 0, 0, 0, 9}, []byte{6, 1, 1, 4}, m))
		}},
		{"IPv4 in IPv6", func(m []byte) []byte { return v6(4, v4(6, syn(m))) }},
		{"IPv6 in IPv6", func(m []byte) []byte { return v6(41, v6(6, syn(m))) }},
	} {
		rows = append(rows, func(m []byte) frame {
			return frame{name: "IPv6 " + x.name, bytes: ether(unix.ETH_P_IPV6, x.make(m)), limits: byPacket}
		})
	}
	return append(rows,
		func(m []byte) frame {
			return frame{name: "IPv6 fragment of IPv6 in IPv6, flags behind it",
				bytes: padded(ether(unix.ETH_P_IPV6, v6(44, slices.Concat([]byte{41, 0, 0, 1, 0, 0, 0, 9}, v6(6, syn(m))[:48]))), m, 8)}
		},
		func(m []byte) frame {
			return frame{name: "IPv6 fragment with flags only",
				bytes: ether(unix.ETH_P_IPV6, v6(44, slices.Concat([]byte{6, 0, 0, 8, 0, 0, 0, 9}, m, syn(m)[12:])))}
		},
		rawSocket("IPv6 raw socket", clientV6, nil, nil),
		func(m []byte) frame {
			return frame{name: "IPv6 in IPv4", bytes: ether(unix.ETH_P_IP, v4(41, v6(6, syn(m)))), limits: byPacket}
		})
}

// syn is a TCP header with the mark as both numbers.
func syn(mark []byte) []byte {
	if mark == nil {
		mark = make([]byte, 4)
	}
	return slices.Concat([]byte{0x80 | mark[2]&0x7f, mark[3], 0x1f, 0x90}, mark, mark, []byte{0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0})
}

// padded is a frame that ends with the first n bytes of a TCP header and goes on behind the packet's end as if nothing
// began there.
func padded(frame, mark []byte, n int) []byte {
	rest := syn(mark)
	rest[13] = 0x10
	return append(frame, append(rest, make([]byte, 24)...)[n:]...)
}

func ip4(from, to netip.Addr, proto byte, fragment uint16, payload []byte) []byte {
	h := slices.Concat([]byte{0x45, 0, 0, 0, 0, 1, 0, 0, 64, proto, 0, 0}, from.AsSlice(), to.AsSlice())
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
	binary.BigEndian.PutUint16(h[6:], fragment)
	return append(sum4(h), payload...)
}

func ip4options(from, to netip.Addr, proto byte, payload []byte) []byte {
	h := slices.Concat([]byte{0x46, 0, 0, 0, 0, 1, 0, 0, 64, proto, 0, 0}, from.AsSlice(), to.AsSlice(), []byte{1, 1, 1, 0})
	binary.BigEndian.PutUint16(h[2:], uint16(24+len(payload)))
	return append(sum4(h), payload...)
}

// sum4 writes the header's checksum: RFC 791 section 3.1.
func sum4(h []byte) []byte {
	sum := uint32(0)
	for i := 0; i < len(h); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum))
	return h
}

func ip6(from, to netip.Addr, next byte, payload []byte) []byte {
	h := slices.Concat([]byte{0x60, 0, 0, 0, 0, 0, next, 64}, from.AsSlice(), to.AsSlice())
	binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
	return append(h, payload...)
}

func ether(proto uint16, payload []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, proto), payload...)
}

// vlan puts a tag ahead that says nothing but a priority, which every host ignores.
func vlan(frame []byte) []byte { return append([]byte{0x81, 0, 0x20, 0}, frame...) }

// send sends from the calling thread.
func (f frame) send(w *watcher, mark []byte) error {
	if f.raw != nil {
		return f.raw(mark)
	}
	eth0, err := net.InterfaceByName("eth0")
	if err != nil {
		return err
	}
	to := &unix.SockaddrLinklayer{Protocol: f.proto<<8 | f.proto>>8, Ifindex: eth0.Index, Halen: 6}
	copy(to.Addr[:], w.router)
	kind, packet := unix.SOCK_DGRAM, f.bytes
	if f.proto == 0 {
		kind, packet = unix.SOCK_RAW, slices.Concat(w.router, eth0.HardwareAddr, f.bytes)
	}
	fd, err := unix.Socket(unix.AF_PACKET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if w.queue {
		to.Protocol = unix.ETH_P_ARP<<8&0xff00 | unix.ETH_P_ARP>>8
	} else if f.proto == 0 {
		// Past the device's queue and all programs there.
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
			return err
		}
	}
	return ignoreDrop(unix.Sendto(fd, packet, 0, to))
}

func sendRaw(to netip.Addr, packet []byte, prepare func(int) error) error {
	family := unix.AF_INET
	if to.Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if prepare != nil {
		if err := prepare(fd); err != nil {
			return err
		}
	}
	return ignoreDrop(unix.Sendto(fd, packet, 0, sockaddr(at(to, 0))))
}

// ignoreDrop: a dropped packet may be told as a full queue.
func ignoreDrop(err error) error {
	if errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EPERM) {
		return nil
	}
	return err
}

// watcher reads what arrives at the client's interface.
type watcher struct {
	fd     int
	router net.HardwareAddr // the node's end of the pod's cable
	queue  bool             // packet sockets use the device's queue, and tell a false type
}

var lastPort = at(clientV4, 7001)

func (s *stage) watch(t *testing.T) *watcher {
	t.Helper()
	w := &watcher{fd: -1}
	check(t,
		s.node.NS.Do(func() error {
			i, err := net.InterfaceByName("pod")
			if err == nil {
				w.router = i.HardwareAddr
			}
			return err
		}),
		s.client.NS.Do(func() (err error) { w.fd, err = tap("eth0"); return err }))
	t.Cleanup(func() { unix.Close(w.fd) })
	packetConn(t, s.app, s.client.NS, lastPort) // or the client answers with an error
	return w
}

// tap is a packet socket that sees all that passes an interface.
func tap(name string) (int, error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return -1, err
	}
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all)
	if err != nil {
		return -1, err
	}
	return fd, errors.Join(patience(fd), unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: i.Index}))
}

// last sends what no redirector touches, after everything else.
func (w *watcher) last(mark []byte) error {
	fd, err := datagram(clientV4)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, append([]byte("last"), mark...), 0, sockaddr(lastPort))
}

// saw reports whether a packet with the mark came before the last one.
func (w *watcher) saw(mark []byte) (bool, error) {
	b, found := make([]byte, 2048), false
	for {
		n, from, err := recvfrom(w.fd, b)
		if err != nil {
			return found, fmt.Errorf("wait for the last packet: %w", err)
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if bytes.Contains(b[:n], append([]byte("last"), mark...)) {
			return found, nil
		}
		found = found || bytes.Contains(b[:n], mark)
	}
}
