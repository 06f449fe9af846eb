package dns

import (
	"context"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

type packet struct {
	b    []byte
	peer netip.AddrPort
	at   netip.Addr // where it was sent to, or from
}

// udpSocket is a UDP socket in memory: what is sent to inc it reads, what it
// writes comes out of outc.
type udpSocket struct {
	net.Conn // nil: whatever is not below is not used
	remote   netip.AddrPort
	inc      chan packet
	outc     chan packet
	donec    chan struct{}
	once     sync.Once

	mu       sync.Mutex
	deadline time.Time
	movedc   chan struct{} // closed and replaced when the deadline moves
}

func newUDPSocket() *udpSocket {
	return &udpSocket{inc: make(chan packet, 64), outc: make(chan packet, 64), donec: make(chan struct{}), movedc: make(chan struct{})}
}

func (s *udpSocket) ReadMsgUDPAddrPort(b, oob []byte) (int, int, int, netip.AddrPort, error) {
	p, err := s.receive()
	if err != nil {
		return 0, 0, 0, p.peer, err
	}
	return copy(b, p.b), copy(oob, arrived(p.at)), 0, p.peer, nil
}

// arrived is what the kernel tells of a datagram that was sent to dst.
func arrived(dst netip.Addr) []byte {
	oob := sockopt.AppendPacketSource(nil, dst)
	if dst.Is4() {
		copy(oob[24:], dst.AsSlice()) // ipi_addr
	}
	return oob
}

func (s *udpSocket) receive() (packet, error) {
	for {
		s.mu.Lock()
		deadline, movedc := s.deadline, s.movedc
		s.mu.Unlock()
		var timec <-chan time.Time
		if !deadline.IsZero() {
			if !time.Now().Before(deadline) {
				return packet{}, os.ErrDeadlineExceeded
			}
			timec = time.After(time.Until(deadline))
		}
		select {
		case p := <-s.inc:
			return p, nil
		case <-timec:
		case <-movedc:
		case <-s.donec:
			return packet{}, net.ErrClosed
		}
	}
}

func (s *udpSocket) WriteMsgUDPAddrPort(b, oob []byte, to netip.AddrPort) (int, int, error) {
	from := netip.Addr{}
	if len(oob) == 32 { // IPv4: ipi_spec_dst
		from = netip.AddrFrom4([4]byte(oob[20:]))
	} else {
		from = sockopt.PacketDestination(oob)
	}
	return len(b), len(oob), s.send(packet{append([]byte(nil), b...), to, from})
}

func (s *udpSocket) send(p packet) error {
	select {
	case <-s.donec:
		return net.ErrClosed
	case s.outc <- p:
		return nil
	}
}

func (s *udpSocket) Read(b []byte) (int, error) { p, err := s.receive(); return copy(b, p.b), err }
func (s *udpSocket) Write(b []byte) (int, error) {
	return len(b), s.send(packet{b: append([]byte(nil), b...)})
}
func (s *udpSocket) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(s.remote) }
func (s *udpSocket) Close() error         { s.once.Do(func() { close(s.donec) }); return nil }
func (s *udpSocket) LocalAddr() net.Addr {
	return net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:15053"))
}

func (s *udpSocket) SetDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deadline = t
	close(s.movedc)
	s.movedc = make(chan struct{})
	return nil
}

func (s *udpSocket) SetReadDeadline(t time.Time) error { return s.SetDeadline(t) }

// bench is one pod's server with everything around it in memory.
type bench struct {
	t      *testing.T
	srv    *Server
	sock   *udpSocket // the server's
	ends   sync.WaitGroup
	cancel context.CancelFunc
	books  *ledger.Account

	mesh    *mesh.Snapshot
	mu      sync.Mutex
	self    *mesh.Workload
	selfc   chan struct{} // closed when self is known
	dialled chan upstream
}

// upstream is a socket that the server has opened.
type upstream struct {
	network string
	server  netip.AddrPort
	udp     *udpSocket
	tcp     *memnet.Conn
}

var (
	client   = netip.MustParseAddrPort("10.8.0.2:40000")
	asked    = netip.MustParseAddrPort("10.9.0.1:53")
	theProxy = netip.MustParseAddrPort("127.0.0.1:15053")
)

func newBench(t *testing.T, limits ledger.Limits) *bench {
	t.Helper()
	b := &bench{t: t, sock: newUDPSocket(), mesh: shop(), self: endpoint("shop", "client", "10.8.0.2", ""),
		selfc: make(chan struct{}), dialled: make(chan upstream, 64), books: ledger.New(limits).Pod("u")}
	ctx, cancel := context.WithCancel(context.Background())
	b.cancel = cancel
	b.srv = NewServer(Config{
		Resolver: NewResolver(ResolverConfig{}), Namespace: "shop", Mesh: func() *mesh.Snapshot { return b.mesh },
		Known: func() *mesh.Workload { b.mu.Lock(); defer b.mu.Unlock(); return b.self },
		Self: func(ctx context.Context) (*mesh.Workload, error) {
			select {
			case <-b.selfc:
				return b.self, nil
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		},
		Dial: func(_ context.Context, network string, server netip.AddrPort) (net.Conn, error) {
			if network == "udp" {
				s := newUDPSocket()
				s.remote = server
				b.dialled <- upstream{network: network, server: server, udp: s}
				return s, nil
			}
			ours, theirs := memnet.PipeAddr(netip.MustParseAddrPort("10.8.0.2:50000"), server)
			b.dialled <- upstream{network: network, server: server, tcp: theirs}
			return ours, nil
		},
		OriginalDst: func(net.Conn) (netip.AddrPort, error) { return asked, nil },
		DatagramDst: func(c, local netip.AddrPort) (netip.AddrPort, error) {
			if c != client || local != theProxy {
				t.Errorf("the destination of %v to %v was asked for", c, local)
			}
			return asked, nil
		},
		Account: b.books,
	})
	b.ends.Go(func() { b.srv.ServePacket(ctx, b.sock) })
	t.Cleanup(b.end)
	return b
}

// end ends the pod and waits for all that runs for it.
func (b *bench) end() {
	b.cancel()
	b.ends.Wait()
	b.srv.Close()
	if n := b.books.InUse(ledger.Queries); n != 0 {
		b.t.Errorf("%d queries are left in the books", n)
	}
}

func packed(t *testing.T, m *mdns.Msg) []byte {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func question(name string, qtype uint16, id uint16) *mdns.Msg {
	m := new(mdns.Msg)
	m.SetQuestion(name, qtype)
	m.Id = id
	return m
}

func unpacked(t *testing.T, b []byte) *mdns.Msg {
	t.Helper()
	m := new(mdns.Msg)
	if err := m.Unpack(b); err != nil {
		t.Fatalf("the message %x is broken: %v", b, err)
	}
	return m
}

// send asks over UDP; reply waits for the next answer.
func (b *bench) send(raw []byte) { b.sock.inc <- packet{raw, client, theProxy.Addr()} }

func (b *bench) reply() *mdns.Msg { b.t.Helper(); return unpacked(b.t, (<-b.sock.outc).b) }
