package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/record"
)

const (
	// pingInterval is how long a tunnel may be silent before it is asked whether it lives.
	pingInterval = 10 * time.Second
	// pingTicks times pingInterval is how long the answer, or any other data, may take; also how long one write may.
	pingTicks = 2
	// assumedMaxStreams is what a client may open before the peer's SETTINGS_MAX_CONCURRENT_STREAMS is known.
	assumedMaxStreams = 100

	// busyBytes within busyTime make a tunnel busy for busyHold: the next stream of its key opens another one.
	busyBytes = 4 << 20
	busyTime  = 100 * time.Millisecond
	busyHold  = 500 * time.Millisecond

	// minRTT is the least round trip that window growth reckons with: below it, scheduling is what would be measured.
	minRTT = time.Millisecond

	drainPing = 0x616d626974_01 // marks the PINGs between the two GOAWAYs of a drain
	lifePing  = 0x616d626974_02
)

// tunnel is one HTTP/2 connection over one TLS connection, on either side.
type tunnel struct {
	// immutable
	client   bool
	rc       recordConn
	w        *writer
	state    *tls.ConnectionState
	peer     identity.ID
	windows  Windows
	base     int  // of windows, what a stream has without asking
	start    int  // what it begins with unless memory is short
	scarce   bool // the node's memory is limited
	local    netip.AddrPort
	remote   netip.AddrPort
	laddr    net.Addr
	raddr    net.Addr
	account  *ledger.Account
	log      *slog.Logger
	conn     net.Conn
	server   *Server         // nil on clients
	ctx      context.Context // server: what handlers' contexts derive from; ends with ServeConn
	notAfter time.Time       // client: no new streams from then on
	set      *tunnelSet      // nil on servers
	gonec    chan struct{}   // client: closed when whom it leads to has left
	clock    func() time.Time

	settingsc chan struct{} // closed when the peer's first SETTINGS came
	closedc   chan struct{} // closed when the transport is closed
	donec     chan struct{} // closed when the tunnel has ended and its reader is gone

	in   reader // owned by the reader goroutine
	info socketInfo

	mu         sync.Mutex
	streams    map[uint32]*Stream // guarded by mu, as are all below
	nextID     uint32             // client: id of the next stream
	highID     uint32             // server: highest id that was let in, or refused for want of room
	refusedID  uint32             // server: highest id above it, refused since the final GOAWAY
	reserved   int                // client: streams promised by the pool and not yet open
	maxStreams int                // what the peer allows
	limit      int                // what our configuration allows
	gone       bool               // client: gonec is closed
	draining   bool               // no new streams from us
	rounds     int                // server: that a drain waits for yet
	refusing   bool               // server: streams above highID are refused
	err        error              // why the tunnel ended
	goAway     *ConnError         // what the peer's GOAWAY complained of
	idleSince  time.Time          // client: since when there are no streams

	keepalive *time.Timer
	seen      uint64 // progress at the last tick
	silent    int    // ticks without progress
	written   uint64
	stuck     int
	unsettled int // ticks for which our SETTINGS were not acknowledged, and that matters

	received  atomic.Uint64 // bytes of plaintext: any of them is a sign of life
	heardAt   atomic.Int64  // client: when the last ones came, ns
	moved     atomic.Int64  // bytes since the last look at the clock
	movedAt   atomic.Int64  // when that was, in ns since the epoch of clock
	busyUntil atomic.Int64
	rtt       atomic.Int64 // smallest round trip seen, ns
	pingAt    atomic.Int64
	asked     atomic.Uint64 // client: received, plus one, when a waiting CONNECT last asked for a sign of life
	handlers  atomic.Int64  // server: handlers running
	answers   atomic.Int64  // server: requests answered since the reader last looked

	acknowledged atomic.Bool // our SETTINGS
}

func newTunnel(rc recordConn, c net.Conn, state *tls.ConnectionState, windows Windows) *tunnel {
	t := &tunnel{
		rc: rc, conn: c, state: state, peer: peerIdentity(state), windows: windows.withDefaults(),
		local: addrPort(c.LocalAddr()), remote: addrPort(c.RemoteAddr()),
		laddr: c.LocalAddr(), raddr: c.RemoteAddr(),
		settingsc: make(chan struct{}), closedc: make(chan struct{}), donec: make(chan struct{}),
		streams: make(map[uint32]*Stream), nextID: 1, maxStreams: assumedMaxStreams, clock: time.Now,
	}
	t.base, t.start = t.windows.base(), t.windows.start()
	t.w = newWriter(rc, func(err error) { t.fail(&lostError{err}) })
	t.w.batch = batchFor(c)
	t.in.init(t)
	return t
}

// peerIdentity is the single SPIFFE URI of the verified leaf. Several URIs are none: which of them would count?
func peerIdentity(cs *tls.ConnectionState) identity.ID {
	if cs == nil || len(cs.PeerCertificates) == 0 || len(cs.PeerCertificates[0].URIs) != 1 {
		return identity.ID{}
	}
	id, err := identity.Parse(cs.PeerCertificates[0].URIs[0].String())
	if err != nil {
		return identity.ID{}
	}
	return id
}

func addrPort(a net.Addr) netip.AddrPort {
	type addrPorter interface{ AddrPort() netip.AddrPort }
	if ap, ok := a.(addrPorter); ok {
		p := ap.AddrPort()
		return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	}
	return netip.AddrPort{}
}

// hello queues our preface: SETTINGS, and the connection window, which SETTINGS cannot carry
// (https://www.rfc-editor.org/rfc/rfc9113#section-6.9.2). The reader sends it before it waits, so that it leaves with
// the answer to the peer's, where that has come already.
func (t *tunnel) hello(maxStreams, maxHeader int) {
	var b []byte
	ss := []setting{
		{settingHeaderTableSize, 0},
		{settingInitialWindow, uint32(t.base)},
		{settingMaxFrame, uint32(t.windows.Frame)},
		{settingMaxHeaderList, uint32(maxHeader)},
		{settingEnableConnect, 1},
	}
	if t.client {
		b = append(b, preface...)
		ss = append(ss, setting{settingEnablePush, 0})
	} else {
		ss = append(ss, setting{settingMaxStreams, uint32(maxStreams)})
	}
	b = appendSettings(b, ss...)
	if !t.scarce { // else once they are acknowledged: see overdraft
		b = t.in.widen(b)
	}
	t.pingAt.Store(t.clock().UnixNano()) // its acknowledgement is the first round trip
	t.w.holdControl(b)
	t.in.held = true
}

// opened tells who asked of the tunnel.
func (t *tunnel) opened(f func(*tls.ConnectionState, func(error)) func()) (ended func()) {
	if f == nil {
		return func() {}
	}
	return f(t.state, t.cut)
}

// run reads until the tunnel ends and returns why: nil after an orderly end.
func (t *tunnel) run() error {
	t.mu.Lock()
	t.keepalive = time.AfterFunc(pingInterval, t.tick)
	t.idleSince = t.clock()
	t.mu.Unlock()

	err := t.in.loop()
	t.fail(err)
	<-t.closedc // our last words are out
	close(t.donec)

	t.mu.Lock()
	defer t.mu.Unlock()
	if errors.Is(t.err, errDrained) {
		return nil
	}
	return t.err
}

// errDrained is why a tunnel without streams ends after GOAWAY or idleness.
var errDrained = errors.New("drained")

// fail ends the tunnel, once: streams see err, the peer a GOAWAY if it is the peer's fault, and the transport closes.
func (t *tunnel) fail(err error) {
	t.mu.Lock()
	if t.err != nil {
		t.mu.Unlock()
		return
	}
	orderly := errors.Is(err, errDrained) || err == io.EOF && t.quietLocked()
	if orderly {
		err = errDrained
	}
	if t.goAway != nil && !orderly {
		err = t.goAway // the peer said why before it closed
	}
	t.err = err
	t.draining = true
	streams := t.streams
	t.streams = make(map[uint32]*Stream)
	last := t.highID
	if t.keepalive != nil {
		t.keepalive.Stop()
	}
	t.mu.Unlock()

	if err == io.EOF {
		err = &lostError{io.ErrUnexpectedEOF}
	}
	for _, s := range streams {
		s.tunnelLost(err)
	}
	if t.set != nil {
		t.set.remove(t)
	}
	ce, protocol := errors.AsType[*ConnError](err)
	if protocol && !ce.Remote {
		t.w.sendLast(appendGoAway(nil, last, ce.Code, ce.Reason))
	}
	t.w.close(err)
	re, records := errors.AsType[*record.Error](err)
	if orderly || protocol || records && !re.Remote {
		// The last frames and close_notify should leave, yet nobody waits for a peer that does not read. Closing the
		// transport releases the reader.
		go t.closeGently()
		return
	}
	_ = t.rc.Cut()
	close(t.closedc)
}

// quietLocked reports whether nothing is lost when the peer closes now: both directions of every stream have had their
// END_STREAM, even if the sender of ours has not yet struck it off.
func (t *tunnel) quietLocked() bool {
	for _, s := range t.streams {
		s.mu.Lock()
		t.w.mu.Lock()
		ended := s.eof && s.sendClosed
		t.w.mu.Unlock()
		s.mu.Unlock()
		if !ended {
			return false
		}
	}
	return true
}

// closeGrace is how long the last frames may take.
const closeGrace = time.Second

func (t *tunnel) closeGently() {
	defer close(t.closedc)
	cut := time.AfterFunc(closeGrace, func() { _ = t.rc.Cut() })
	defer cut.Stop()
	t.w.finish()
	_ = t.rc.Close() // the peer is gone or has had its answer
}

// cut ends the tunnel at once.
func (t *tunnel) cut(err error) { t.fail(err) }

// drain lets no new stream in and ends the tunnel when the last one is gone.
func (t *tunnel) drain() {
	t.mu.Lock()
	if t.err != nil || t.draining {
		t.mu.Unlock()
		return
	}
	t.draining = true
	idle := len(t.streams) == 0 && t.reserved == 0
	t.mu.Unlock()
	t.w.sendControl(appendGoAway(nil, 0, CodeNo, ""))
	if idle {
		t.fail(errDrained)
	}
}

// tick is the tunnel's only timer: life, stuck writes and idleness.
func (t *tunnel) tick() {
	seen := t.received.Load()
	written, writing := t.w.progress()
	patience := time.Duration(0) // with being idle
	if t.set != nil {
		patience = t.set.patience(t)
	}

	t.mu.Lock()
	if t.err != nil {
		t.mu.Unlock()
		return
	}
	if seen != t.seen {
		t.seen, t.silent = seen, 0
	} else {
		t.silent++
	}
	if writing && written == t.written {
		t.stuck++
	} else {
		t.written, t.stuck = written, 0
	}
	dead := t.silent > pingTicks || t.stuck > pingTicks
	if t.overdraft() > 0 {
		t.unsettled++
	}
	unsettled := t.unsettled > pingTicks
	idle := t.set != nil && len(t.streams) == 0 && t.reserved == 0 &&
		(t.clock().Sub(t.idleSince) >= patience || t.staleLocked(t.clock()))
	if idle {
		t.draining = true
	}
	ping := t.silent == 1
	t.keepalive.Reset(pingInterval)
	t.mu.Unlock()

	switch {
	case dead:
		t.fail(&lostError{errPingTimeout})
	case unsettled: // its streams may hold more than is counted
		t.fail(connFault(CodeSettingsTimeout, "SETTINGS not acknowledged"))
	case idle:
		t.fail(errDrained)
	case ping:
		t.pingAt.Store(t.clock().UnixNano())
		t.w.sendControl(appendPing(nil, 0, lifePing))
	}
}

// sampleRTT ends a measurement begun by SETTINGS or PING.
func (t *tunnel) sampleRTT() {
	at := t.pingAt.Swap(0)
	if at == 0 {
		return
	}
	rtt := max(t.clock().UnixNano()-at, 1)
	if cur := t.rtt.Load(); cur == 0 || rtt < cur {
		t.rtt.Store(rtt)
	}
}

// noteMoved accounts n bytes of payload; a tunnel that moves much is busy.
func (t *tunnel) noteMoved(n int) {
	if t.moved.Add(int64(n)) < busyBytes {
		return
	}
	t.moved.Store(0)
	now := t.clock().UnixNano()
	if now-t.movedAt.Swap(now) < int64(busyTime) {
		t.busyUntil.Store(now + int64(busyHold))
	}
}

func (t *tunnel) busy(now time.Time) bool { return t.busyUntil.Load() > now.UnixNano() }

// newStream returns a stream with the windows that our SETTINGS promise.
func (t *tunnel) newStream(id uint32) *Stream {
	s := &Stream{t: t, id: id, recvWindow: t.base, window: t.base}
	s.recvCond.L = &s.mu
	s.sendCond.L = &t.w.mu
	s.infoAt, _ = t.info.read(t.conn)
	return s
}

func (t *tunnel) stream(id uint32) *Stream {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.streams[id]
}

// removeStream forgets a stream that is closed in both directions.
func (t *tunnel) removeStream(s *Stream) {
	t.mu.Lock()
	if t.streams[s.id] != s {
		t.mu.Unlock()
		return
	}
	delete(t.streams, s.id)
	last := len(t.streams) == 0 && t.reserved == 0
	if last {
		t.idleSince = t.clock()
	}
	done := last && t.draining && (t.client || t.refusing)
	t.mu.Unlock()
	if done {
		t.fail(errDrained)
	}
}

// connFault ends the tunnel because the peer broke the protocol.
func connFault(code ErrCode, reason string) error { return &ConnError{Code: code, Reason: reason} }

// drainRounds is how many round trips a drain gives the peer between its two GOAWAYs. One is too few: peers answer a PING
// before all else, also before CONNECTs that had waited to be sent when they read the GOAWAY. These leave in the same
// batch, behind the answer, and a peer need not try elsewhere what is refused then. The second answer is behind them.
const drainRounds = 2

// serverDrain is the server's graceful end: a GOAWAY that still admits what is under way, and after some round trips the
// final one (https://www.rfc-editor.org/rfc/rfc9113#section-6.8).
func (t *tunnel) serverDrain() {
	t.mu.Lock()
	if t.err != nil || t.draining {
		t.mu.Unlock()
		return
	}
	t.draining = true
	t.rounds = drainRounds
	t.mu.Unlock()
	t.w.sendControl(appendPing(appendGoAway(nil, maxStreamID, CodeNo, ""), 0, drainPing))
}

// drainAnswered is told of the answer to a drain's PING; what nobody asked for counts for nothing.
func (t *tunnel) drainAnswered() {
	t.mu.Lock()
	left := t.rounds
	t.rounds = max(0, left-1)
	t.mu.Unlock()
	switch left {
	case 0:
	case 1:
		t.finalGoAway()
	default:
		t.w.sendControl(appendPing(nil, 0, drainPing))
	}
}

func (t *tunnel) finalGoAway() {
	t.mu.Lock()
	if t.err != nil || t.refusing {
		t.mu.Unlock()
		return
	}
	t.refusing = true
	last, idle := t.highID, len(t.streams) == 0
	t.mu.Unlock()
	t.w.sendControl(appendGoAway(nil, last, CodeNo, ""))
	if idle {
		t.fail(errDrained)
	}
}

// awaitSettings waits for the peer's first SETTINGS.
func (t *tunnel) awaitSettings(ctx context.Context) error {
	select {
	case <-t.settingsc:
		return nil
	case <-t.donec:
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.err == errDrained {
			return io.ErrUnexpectedEOF // orderly elsewhere, but here the peer owed us something
		}
		return t.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// firstSettings ends the handshake's deadline.
func (t *tunnel) firstSettings() {
	_ = t.conn.SetDeadline(time.Time{})
	close(t.settingsc)
}

// open starts a CONNECT on a slot that the pool has reserved.
func (t *tunnel) open(r ConnectRequest, early []byte) (*Stream, error) {
	s, err := t.tryOpen(r, early)
	if err != nil {
		t.unreserve()
		return nil, err
	}
	t.w.mu.Lock()
	t.w.flushTogetherLocked()
	t.w.mu.Unlock()
	return s, nil
}

// tryOpen makes a stream of the slot, or leaves it reserved.
func (t *tunnel) tryOpen(r ConnectRequest, early []byte) (*Stream, error) {
	if err := checkFields(r.Header); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil || t.draining {
		return nil, errRefused
	}
	t.reserved--
	s := t.newStream(t.nextID)
	s.answerc = make(chan struct{})
	wider := s.widen()
	t.nextID += 2
	if t.nextID > maxStreamID {
		t.draining = true
	}
	t.w.mu.Lock()
	defer t.w.mu.Unlock()
	var a [1024]byte
	b := t.w.beginBlockLocked(a[:0])
	b = appendIndexedName(b, staticMethod, "CONNECT")
	b = appendIndexedName(b, staticAuthority, r.Authority)
	for _, f := range r.Header {
		b = appendField(b, f.Name, f.Value)
	}
	t.streams[s.id] = s
	s.sendWindow = t.w.initialWindow
	t.w.packHeadersLocked(s.id, b, 0)
	if wider > 0 {
		t.w.packLocked(appendWindowUpdate(nil, s.id, wider))
	}
	s.packEarlyLocked(early)
	return s, nil
}

// unreserve gives up a slot.
func (t *tunnel) unreserve() {
	t.mu.Lock()
	t.reserved--
	done := t.reserved == 0 && len(t.streams) == 0 && t.draining
	if len(t.streams) == 0 {
		t.idleSince = t.clock()
	}
	t.mu.Unlock()
	if done {
		t.fail(errDrained)
	}
}

// load reports how many streams use the tunnel, and whether another one may.
func (t *tunnel) load(now time.Time) (n int, usable bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n = len(t.streams) + t.reserved
	return n, t.err == nil && !t.draining && n < min(t.limit, t.maxStreams) && !t.staleLocked(now)
}

// staleLocked reports whether the tunnel takes no new streams any more.
func (t *tunnel) staleLocked(now time.Time) bool {
	return !t.notAfter.IsZero() && !now.Before(t.notAfter)
}

// reserve takes a slot that load saw.
func (t *tunnel) reserve() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil || t.draining || len(t.streams)+t.reserved >= min(t.limit, t.maxStreams) {
		return false
	}
	t.reserved++
	return true
}

// goneAway is the peer's GOAWAY: streams above last were not processed and may be tried elsewhere.
func (t *tunnel) goneAway(last uint32, code ErrCode, debug string) {
	t.mu.Lock()
	t.draining = true
	if code != CodeNo {
		t.goAway = &ConnError{Code: code, Remote: true, Reason: debug}
	}
	var refused []*Stream
	for id, s := range t.streams {
		if t.client && id > last {
			refused = append(refused, s)
		}
	}
	idle := len(t.streams) == 0 && t.reserved == 0
	t.mu.Unlock()
	for _, s := range refused {
		err := &ResetError{CodeRefusedStream, true}
		s.failWrite(err)
		s.failRead(err)
		s.finish(sendDone | recvDone)
	}
	if idle && t.client {
		t.fail(errDrained)
	}
}
