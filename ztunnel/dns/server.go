package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// Port of the listeners in a pod; portServer is that of the servers.
const (
	Port       = 15053
	portServer = 53
)

const (
	defaultTTL = 30 // the reference's

	// selfWait is how long a name of the mesh waits for the pod's own workload:
	// less than resolvers wait for an answer.
	selfWait = 2 * time.Second
	// idleTimeout of TCP connections: RFC 7766 §6.2.3 wants seconds.
	idleTimeout = 10 * time.Second
	// maxStreams are a pod's TCP connections. Resolvers use one at a time.
	maxStreams = 256
	// maxQuery is the largest datagram taken: a question, an OPT record with
	// cookies and padding. RFC 8467 pads queries to multiples of 128 bytes.
	maxQuery = smallBuffer
)

// Config of a Server.
type Config struct {
	Resolver  *Resolver
	Namespace string
	Network   string
	// Mesh is the current snapshot.
	Mesh func() *mesh.Snapshot
	// Known is the pod's workload, nil while the control plane has sent none;
	// Self waits for it. Names of the mesh are answered to known pods only.
	Known func() *mesh.Workload
	Self  func(context.Context) (*mesh.Workload, error)
	// Dial opens the pod's sockets.
	Dial Dial
	// Search are further search domains of the client, if they are known.
	Search []string
	// OriginalDst of a redirected connection, DatagramDst of a redirected
	// datagram that came from client to local, unless local stands for a server:
	// then the kernel knows it.
	OriginalDst func(net.Conn) (netip.AddrPort, error)
	DatagramDst func(client, local netip.AddrPort) (netip.AddrPort, error)
	Account     *ledger.Account
	TTL         time.Duration // of the mesh's records; default 30 s
	Metrics     *Metrics      // nil: none
	Logger      *slog.Logger  // nil: none
}

// Server is one pod's.
type Server struct {
	cfg     Config
	client  Client
	ttl     uint32
	log     *slog.Logger
	streams atomic.Int64
	member  member
}

// NewServer returns a server without sockets.
func NewServer(cfg Config) *Server {
	s := &Server{cfg: cfg, client: cfg.Resolver.Client(cfg.Namespace, cfg.Network).Searching(cfg.Search), ttl: defaultTTL, log: cfg.Logger}
	if cfg.TTL > 0 {
		s.ttl = uint32(min(cfg.TTL/time.Second, 1<<31-1)) // RFC 2181 §8
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.member.m = cfg.Metrics
	return s
}

// Close ends the pod's series. The Serve calls end with their contexts.
func (s *Server) Close() { s.member.close() }

// workload is the pod's own, nil while it is unknown.
func (s *Server) workload() *mesh.Workload {
	w := s.cfg.Known()
	s.member.see(w)
	return w
}

// PacketConn is a UDP socket that tells where datagrams were sent to
// (sockopt.Options.PacketInfo); *net.UDPConn is one.
type PacketConn interface {
	ReadMsgUDPAddrPort(b, oob []byte) (n, oobn, flags int, from netip.AddrPort, err error)
	WriteMsgUDPAddrPort(b, oob []byte, to netip.AddrPort) (n, oobn int, err error)
	LocalAddr() net.Addr
	Close() error
}

// way is between whom a datagram travelled. Its answer goes back from local, or
// the client would not know it.
type way struct{ client, local netip.AddrPort }

// answer writes b, with room for what goes with it.
func (w way) answer(pc PacketConn, room *packetInfo, b []byte) {
	_, _, _ = pc.WriteMsgUDPAddrPort(b, sockopt.AppendPacketSource(room[:0], w.local.Addr()), w.client) // the client asks again
}

type packetInfo [sockopt.PacketInfoLen]byte

// verdict is what becomes of a question.
type verdict int

const (
	foreign verdict = iota // the asked server's
	ours                   // in the answer
	exists                 // the asked server's, but the name is known to exist
	refuse                 // notImplemented
)

// decide resolves m if it is about a name of the mesh.
func (s *Server) decide(m *message, a *answer, limit int) verdict {
	a.owned = false
	switch {
	case m.flags&opcodes != 0:
		return refuse
	// The asked server knows what is to be said to other classes, to later
	// versions of EDNS and to names that are no host names.
	case m.class != classIN, !m.plain, m.labels == 0, m.version != 0:
		return foreign
	case m.qtype == dnsmessage.TypeAXFR, m.qtype == typeIXFR:
		return foreign
	}
	q := query{name: m.name, labels: m.labels, qtype: m.qtype, max: limit/16 + 1, rnd: rand.Uint64()}
	s.cfg.Resolver.resolve(s.cfg.Mesh(), &s.client, q, a)
	if !a.owned {
		return foreign
	}
	switch m.qtype {
	case dnsmessage.TypeA, dnsmessage.TypeAAAA, dnsmessage.TypeSRV, dnsmessage.TypeALL, typeSVCB, typeHTTPS:
		// Hints in an HTTPS record would lead around the mesh's own addresses.
		return ours
	}
	if a.cluster {
		return ours
	}
	// TXT or MX of an external host that has a ServiceEntry: only the world knows.
	return exists
}

const typeIXFR = 251

// ServePacket answers datagrams until ctx ends, and closes pc.
func (s *Server) ServePacket(ctx context.Context, pc PacketConn) {
	ctx, cancel := context.WithCancelCause(ctx)
	var queries sync.WaitGroup
	defer queries.Wait()
	defer cancel(net.ErrClosed)
	defer pc.Close()
	defer context.AfterFunc(ctx, func() { _ = pc.Close() })() // wakes the read
	port := addrPort(pc.LocalAddr()).Port()
	var (
		in  [maxQuery]byte
		oob packetInfo
		out []byte
		m   message
		a   answer
	)
	for {
		n, oobn, _, client, err := pc.ReadMsgUDPAddrPort(in[:], oob[:])
		switch {
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			// An ICMP error about an answer nobody waited for, or memory pressure:
			// neither must end the pod's DNS, nor spin.
			select {
			case <-time.After(time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		dst := sockopt.PacketDestination(oob[:oobn])
		if !sockopt.ForOwnPod(dst) {
			s.cfg.Metrics.drop("foreign") // the resolver is for its pod only
			continue
		}
		w := way{client: client, local: netip.AddrPortFrom(dst, port)}
		v, reply := s.datagram(in[:n], &m, &a, out[:0])
		if reply != nil {
			w.answer(pc, &oob, reply)
			out = reply
			continue
		}
		if v == nobody {
			continue
		}
		places := m.places()
		if !s.cfg.Account.TryAcquire(ledger.Queries, places) {
			s.cfg.Metrics.drop("limit")
			w.answer(pc, &oob, appendError(out[:0], &m, dnsmessage.RCodeServerFailure))
			continue
		}
		raw := append([]byte(nil), in[:n]...)
		queries.Go(func() {
			defer s.cfg.Account.Release(ledger.Queries, places)
			s.later(ctx, raw, v, pc, w)
		})
	}
}

// nobody gets an answer.
const nobody verdict = -1

// datagram answers at once what can be: a nil reply leaves the rest to later.
func (s *Server) datagram(b []byte, m *message, a *answer, out []byte) (verdict, []byte) {
	switch err := m.parse(b); {
	case errors.Is(err, errMalformed):
		s.cfg.Metrics.drop("malformed")
		m.question, m.edns = nil, false // half parsed
		return refuse, appendError(out, m, dnsmessage.RCodeFormatError)
	case err != nil:
		s.cfg.Metrics.drop("malformed")
		return nobody, nil
	}
	v := s.decide(m, a, m.limit())
	switch {
	case v == refuse:
		s.cfg.Metrics.request(s.workload(), m.qtype, "udp")
		return v, appendError(out, m, dnsmessage.RCodeNotImplemented)
	case v == ours && s.workload() != nil:
		s.cfg.Metrics.request(s.workload(), m.qtype, "udp")
		s.logAnswer(m, "udp", a)
		return v, s.cfg.Resolver.appendAnswer(out, m, a, s.ttl, m.limit())
	}
	return v, nil
}

// later answers a datagram that has to wait for somebody.
func (s *Server) later(ctx context.Context, raw []byte, v verdict, pc PacketConn, between way) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	var m message
	var oob packetInfo
	if err := m.parse(raw); err != nil {
		panic("BUG: dns: a question was parsed once and not twice: " + err.Error())
	}
	if v == ours {
		var a answer
		between.answer(pc, &oob, s.known(ctx, &m, &a, nil, "udp", m.limit()))
		return
	}
	w := s.workload()
	s.cfg.Metrics.request(w, m.qtype, "udp")
	buf, free := m.buffer()
	defer free()
	server, err := s.asked(between)
	if err == nil {
		err = checkServer(server)
	}
	var reply []byte
	start := time.Now()
	if err == nil {
		reply, server, err = exchange(ctx, s.cfg.Dial, server, &m, buf)
		s.cfg.Metrics.upstream(w, m.qtype, "udp", time.Since(start), err)
	}
	s.logForward(&m, "udp", server, start, err)
	if err != nil {
		reply = appendError(buf[:0], &m, dnsmessage.RCodeServerFailure)
	} else if v == exists {
		nameExists(reply)
	}
	between.answer(pc, &oob, reply)
}

// asked is the server that a datagram was meant for, or an address that stands
// for it.
func (s *Server) asked(between way) (netip.AddrPort, error) {
	if sockopt.StandsForAnother(between.local.Addr()) {
		return netip.AddrPortFrom(between.local.Addr(), portServer), nil
	}
	return s.cfg.DatagramDst(between.client, between.local)
}

// known answers with the mesh's knowledge once the pod itself is known to it.
func (s *Server) known(ctx context.Context, m *message, a *answer, out []byte, proto string, limit int) []byte {
	w := s.workload()
	var err error
	if w == nil {
		ctx, cancel := context.WithTimeout(ctx, selfWait)
		defer cancel()
		w, err = s.cfg.Self(ctx)
	}
	s.cfg.Metrics.request(w, m.qtype, proto)
	if err == nil && s.decide(m, a, limit) != ours {
		err = errors.New("the name has just left the mesh") // the next question goes upstream
	}
	if err != nil {
		s.logForward(m, proto, netip.AddrPort{}, time.Now(), err)
		return appendError(out, m, dnsmessage.RCodeServerFailure)
	}
	s.logAnswer(m, proto, a)
	return s.cfg.Resolver.appendAnswer(out, m, a, s.ttl, limit)
}

// nameExists turns "no such name" into "no such record": the mesh knows the name,
// and a client that is told otherwise may not ask for its address (RFC 8020).
func nameExists(reply []byte) {
	if reply[3]&rcodes == byte(dnsmessage.RCodeNameError) {
		reply[3] &^= rcodes
	}
}

// checkServer keeps a question from going round in circles.
func checkServer(server netip.AddrPort) error {
	if !server.IsValid() || server.Addr().IsUnspecified() || server.Port() == Port && server.Addr().IsLoopback() {
		return fmt.Errorf("no server was asked: the query came to %s itself; only the mesh's names are known here", server)
	}
	return nil
}

// ServeStream answers one TCP connection until it or ctx ends. The caller closes
// c.
func (s *Server) ServeStream(ctx context.Context, c net.Conn) {
	defer s.streams.Add(-1)
	if s.streams.Add(1) > maxStreams {
		s.cfg.Metrics.drop("connections")
		return
	}
	defer context.AfterFunc(ctx, func() { interrupt(c) })()
	up := &stream{dial: s.cfg.Dial}
	defer up.close()
	for {
		_ = c.SetDeadline(time.Now().Add(idleTimeout)) // a closed connection fails below
		if ctx.Err() != nil {
			return // the line above undid the interruption
		}
		n, err := readLength(c)
		if err != nil || !s.message(ctx, c, n, up) {
			return
		}
	}
}

// message answers one message of n bytes and reports whether the connection goes
// on. Buffers are held no longer than it takes.
func (s *Server) message(ctx context.Context, c net.Conn, n int, up *stream) bool {
	if !s.cfg.Account.TryAcquire(ledger.Queries, largeQuery) {
		s.cfg.Metrics.drop("limit")
		return false
	}
	defer s.cfg.Account.Release(ledger.Queries, largeQuery)
	in, out := buffers.Get().(*[maxMessage + 2]byte), buffers.Get().(*[maxMessage + 2]byte)
	defer buffers.Put(in)
	defer buffers.Put(out)
	raw, err := readBody(c, in[:], n)
	if err != nil {
		return false
	}
	var m message
	var a answer
	if err := m.parse(raw); err != nil {
		s.cfg.Metrics.drop("malformed")
		if errors.Is(err, errMalformed) {
			m.question, m.edns = nil, false
			_ = writeMessage(c, out, appendError(nil, &m, dnsmessage.RCodeFormatError)) // closed next
		}
		return false
	}
	const limit = maxMessage
	switch v := s.decide(&m, &a, limit); v {
	case refuse:
		return writeMessage(c, out, appendError(nil, &m, dnsmessage.RCodeNotImplemented)) == nil
	case ours:
		return writeMessage(c, out, s.known(ctx, &m, &a, nil, "tcp", limit)) == nil
	default:
		return s.relay(ctx, c, &m, v, up, out)
	}
}

// relay passes a question on over TCP.
func (s *Server) relay(ctx context.Context, c net.Conn, m *message, v verdict, up *stream, out *[maxMessage + 2]byte) bool {
	w := s.workload()
	s.cfg.Metrics.request(w, m.qtype, "tcp")
	start := time.Now()
	var err error
	if !up.server.IsValid() {
		if up.server, err = s.cfg.OriginalDst(c); err == nil {
			err = checkServer(up.server)
		}
	}
	buf := buffers.Get().(*[maxMessage + 2]byte)
	defer buffers.Put(buf)
	up.buf = out
	defer func() { up.buf = nil }()
	if err == nil && (m.qtype == dnsmessage.TypeAXFR || m.qtype == typeIXFR) {
		_ = c.SetDeadline(time.Time{}) // writes are bounded by the other side's reads
		err := up.transfer(ctx, m, c, idleTimeout, buf[:])
		s.logForward(m, "tcp", up.server, start, err)
		return false
	}
	var reply []byte
	if err == nil {
		qctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
		reply, err = up.ask(qctx, m, buf[:])
		cancel()
		s.cfg.Metrics.upstream(w, m.qtype, "tcp", time.Since(start), err)
	}
	s.logForward(m, "tcp", up.server, start, err)
	if err != nil {
		reply = appendError(buf[:0], m, dnsmessage.RCodeServerFailure)
	} else if v == exists {
		nameExists(reply)
	}
	return writeMessage(c, out, reply) == nil
}

func addrPort(a net.Addr) netip.AddrPort {
	if u, ok := a.(*net.UDPAddr); ok {
		ap := u.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}

func (s *Server) logAnswer(m *message, proto string, a *answer) {
	if !s.log.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	s.log.LogAttrs(context.Background(), slog.LevelDebug, "dns answer", slog.String("query", string(m.name)),
		slog.String("type", typeName(m.qtype)), slog.String("protocol", proto), slog.Int("records", len(a.addrs)+len(a.targets)))
}

func (s *Server) logForward(m *message, proto string, server netip.AddrPort, start time.Time, err error) {
	if !s.log.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	attrs := []slog.Attr{slog.String("query", string(m.name)), slog.String("type", typeName(m.qtype)), slog.String("protocol", proto),
		slog.String("server", server.String()), slog.String("duration", time.Since(start).Round(time.Microsecond).String())}
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	s.log.LogAttrs(context.Background(), slog.LevelDebug, "dns forwarded", attrs...)
}
