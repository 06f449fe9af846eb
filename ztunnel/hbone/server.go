package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

// Server serves accepted connections. All methods may be called from any goroutine.
type Server struct {
	cfg ServerConfig
	met *metrics

	mu      sync.Mutex
	conns   map[net.Conn]struct{} // handshaking; guarded by mu
	sources map[netip.Addr]int    // how many of conns each address has; guarded by mu
	tunnels map[*tunnel]struct{}  // guarded by mu
	closing bool                  // guarded by mu
	wg      sync.WaitGroup        // ServeConn calls and handlers
}

// NewServer returns a server that serves nothing yet.
func NewServer(cfg ServerConfig) *Server {
	if cfg.MaxConcurrentStreams == 0 {
		cfg.MaxConcurrentStreams = 200
	}
	if cfg.HandshakesPerSource == 0 {
		cfg.HandshakesPerSource = 64
	}
	if cfg.HandshakeTimeout == 0 {
		cfg.HandshakeTimeout = 10 * time.Second
	}
	if cfg.MaxHeaderBytes == 0 {
		cfg.MaxHeaderBytes = serverMaxHeader
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Server{
		cfg: cfg, met: newMetrics(cfg.Registerer),
		conns: make(map[net.Conn]struct{}), sources: make(map[netip.Addr]int), tunnels: make(map[*tunnel]struct{}),
	}
}

// ServeConn serves one accepted connection to its end and closes it. It returns nil when the peer or Shutdown ended it
// in order, and otherwise a *ServeError. When ctx ends, the connection is cut.
func (s *Server) ServeConn(ctx context.Context, c net.Conn) error {
	defer c.Close()
	remote := addrPort(c.RemoteAddr())
	switch err := s.enter(c); err {
	case nil:
	case ErrServerClosed:
		return err
	default:
		resetConn(c)
		s.met.handshake(serverSide, err)
		return &ServeError{StageLocal, remote, err}
	}
	defer s.wg.Done()
	if err := s.cfg.Account.Acquire(ctx, ledger.Connections, 1); err != nil {
		s.leave(c)
		return &ServeError{StageLocal, remote, err}
	}
	defer s.cfg.Account.Release(ledger.Connections, 1)

	t, err := s.secure(ctx, c)
	s.met.handshake(serverSide, err)
	if err != nil {
		s.leave(c)
		return &ServeError{StageTLS, remote, err}
	}
	hctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t.ctx = hctx
	stop := context.AfterFunc(ctx, func() { t.cut(context.Cause(ctx)) })
	defer stop()
	if !s.promote(c, t) {
		t.cut(ErrServerClosed)
	}
	ended, closed := t.opened(s.cfg.Opened), s.met.open(serverSide)
	err = t.run()
	closed()
	ended()
	s.mu.Lock()
	delete(s.tunnels, t)
	s.mu.Unlock()
	if err != nil {
		return &ServeError{StageH2, remote, err}
	}
	return nil
}

// secure completes TLS within the deadline, which goes on until the client's SETTINGS.
func (s *Server) secure(ctx context.Context, c net.Conn) (*tunnel, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.cfg.HandshakeTimeout, os.ErrDeadlineExceeded)
	defer cancel()
	if err := s.cfg.Account.Acquire(ctx, ledger.Handshakes, 1); err != nil {
		return nil, err
	}
	defer s.cfg.Account.Release(ledger.Handshakes, 1)
	cfg, err := s.cfg.TLS(ctx, addrPort(c.LocalAddr()))
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Now().Add(s.cfg.HandshakeTimeout)); err != nil {
		return nil, err
	}
	rc, state, err := serverRecords(ctx, c, cfg, s.cfg.AmbitRecords, s.cfg.Account)
	if err != nil {
		return nil, err
	}
	t := newTunnel(rc, c, state, s.cfg.Windows)
	t.info.met = s.met
	t.server, t.log = s, s.cfg.Logger
	t.bind(s.cfg.Account)
	t.in.configure(s.cfg.MaxHeaderBytes)
	t.hello(s.cfg.MaxConcurrentStreams, s.cfg.MaxHeaderBytes)
	return t, nil
}

// scarceHandshakes bounds a source while the node is short of handshakes: enough for a gateway that reconnects.
const scarceHandshakes = 8

// enter lets a connection begin its handshake. The bound is per address, /32 or /128: that is what a pod has, and what it
// must own to complete a TCP connection. A wider IPv6 prefix would make neighbours on a node pay for each other. 64 is
// 1/16 of the node's default, and far more than a client's pool dials to one pod at a time.
func (s *Server) enter(c net.Conn) error {
	most := s.cfg.HandshakesPerSource
	if s.cfg.Account.Pressure(ledger.Handshakes) {
		most = min(most, scarceHandshakes)
	}
	src := addrPort(c.RemoteAddr()).Addr()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return ErrServerClosed
	}
	if src.IsValid() && s.sources[src] >= most {
		return ErrTooManyHandshakes
	}
	s.conns[c] = struct{}{}
	s.sources[src]++
	s.wg.Add(1)
	return nil
}

// resetConn refuses a connection where it costs us least: nothing lingers.
func resetConn(c net.Conn) {
	switch c := c.(type) {
	case interface{ Reset() error }:
		_ = c.Reset()
	case interface{ SetLinger(sec int) error }:
		_ = c.SetLinger(0)
	}
	_ = c.Close()
}

func (s *Server) leave(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leaveLocked(c)
}

func (s *Server) leaveLocked(c net.Conn) {
	delete(s.conns, c)
	src := addrPort(c.RemoteAddr()).Addr()
	if s.sources[src]--; s.sources[src] <= 0 {
		delete(s.sources, src)
	}
}

// promote moves a connection from the handshaking ones to the tunnels.
func (s *Server) promote(c net.Conn, t *tunnel) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leaveLocked(c)
	s.tunnels[t] = struct{}{}
	return !s.closing
}

// close closes handshaking connections, lets no new ones in and returns the tunnels.
func (s *Server) close() []*tunnel {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = true
	for c := range s.conns {
		_ = c.Close() // nothing was promised to it
	}
	ts := make([]*tunnel, 0, len(s.tunnels))
	for t := range s.tunnels {
		ts = append(ts, t)
	}
	return ts
}

// Retire asks the peers of the tunnels that exist to go elsewhere, and goes on serving: streams end when they end, and
// who connects anew is let in. It is for a pod that will end soon and still takes what reaches it.
func (s *Server) Retire() {
	s.mu.Lock()
	ts := make([]*tunnel, 0, len(s.tunnels))
	for t := range s.tunnels {
		ts = append(ts, t)
	}
	s.mu.Unlock()
	for _, t := range ts {
		t.serverDrain()
	}
}

// Shutdown tells all peers to go elsewhere and waits until their streams have ended; when ctx ends first, it cuts them.
func (s *Server) Shutdown(ctx context.Context) error {
	for _, t := range s.close() {
		t.serverDrain()
	}
	donec := make(chan struct{})
	go func() {
		defer close(donec)
		s.wg.Wait()
	}()
	select {
	case <-donec:
		return nil
	case <-ctx.Done():
		for _, t := range s.close() {
			t.cut(ErrServerClosed)
		}
		<-donec
		return context.Cause(ctx)
	}
}

// Close cuts all connections and waits for handlers.
func (s *Server) Close() error {
	for _, t := range s.close() {
		t.cut(ErrServerClosed)
	}
	s.wg.Wait()
	return nil
}

// newRequest begins a stream of the client's.
func (r *reader) newRequest(id uint32, hd *head, end bool) error {
	t := r.t
	if id%2 == 0 {
		return connFault(CodeProtocol, "even stream id from client")
	}
	t.mu.Lock()
	if id <= t.highID { // a stream that is over: https://www.rfc-editor.org/rfc/rfc9113#section-5.1.1
		t.mu.Unlock()
		return r.flood()
	}
	refuse, most := "", t.server.cfg.MaxConcurrentStreams
	switch {
	case t.refusing:
		refuse = refusedDraining
	case len(t.streams) >= most || int(t.handlers.Load()) >= most:
		refuse = refusedLimit
	}
	if t.refusing {
		t.refusedID = max(t.refusedID, id)
	} else {
		t.highID = id
	}
	t.mu.Unlock()
	if refuse == "" && !t.account.TryAcquire(ledger.Streams, 1) {
		refuse = refusedExhausted
	}
	if refuse != "" {
		t.server.met.refused.WithLabelValues(refuse).Inc()
		if err := r.flood(); err != nil {
			return err
		}
		return r.control(appendRST(nil, id, CodeRefusedStream))
	}
	s := t.newStream(id)
	s.eof = end
	ctx, cancel := context.WithCancel(t.ctx)
	s.cancel = cancel

	t.mu.Lock()
	if t.err != nil { // nobody would tell the stream
		t.mu.Unlock()
		cancel()
		s.release()
		return nil
	}
	t.streams[id] = s
	t.w.mu.Lock()
	s.sendWindow = t.w.initialWindow
	t.w.mu.Unlock()
	t.mu.Unlock()
	if end {
		s.finish(recvDone)
	}
	req := &Request{
		Method: hd.method, Authority: hd.authority, Headers: hd.fields,
		Peer: t.peer, TLS: t.state, RemoteAddr: t.remote, LocalAddr: t.local, s: s,
	}
	if status := badRequest(hd); status != 0 {
		if status == protocolFault {
			s.abort(CodeProtocol)
		} else {
			req.Reject(status)
		}
		cancel()
		return r.flood()
	}
	r.resets = max(0, r.resets-int(t.answers.Swap(0))) // who waits for answers is a busy client, not an attacker
	t.handlers.Add(1)
	t.server.wg.Add(1)
	t.server.met.requests.Inc()
	go t.serve(ctx, cancel, req)
	return nil
}

// serve runs the handler of one request.
func (t *tunnel) serve(ctx context.Context, cancel context.CancelFunc, req *Request) {
	req.ended = func() { t.served(cancel, req) }
	t.server.cfg.Handler(ctx, req)
	if !req.kept {
		req.ended()
	}
}

// served ends the work on a request.
func (t *tunnel) served(cancel context.CancelFunc, req *Request) {
	req.Reject(503) // no-op after an answer
	cancel()
	t.handlers.Add(-1)
	t.server.wg.Done()
}

const protocolFault = -1

// badRequest returns what answers a request that no handler needs to see, or 0.
func badRequest(hd *head) int {
	switch {
	case hd.tooLarge:
		return 431
	case hd.malformed != nil || hd.method == "" || hd.status != 0:
		return protocolFault
	case hd.method != "CONNECT" || hd.authority == "" || hd.protocol != "":
		return 400
	case hd.scheme != "" || hd.path != "":
		return protocolFault // https://www.rfc-editor.org/rfc/rfc9113#section-8.5
	}
	return 0
}

// Request is a CONNECT that waits for an answer.
type Request struct {
	Method, Authority     string
	Headers               Header
	Peer                  identity.ID // zero: the leaf has no single SPIFFE URI
	TLS                   *tls.ConnectionState
	RemoteAddr, LocalAddr netip.AddrPort

	s     *Stream
	kept  bool // owned by the handler's goroutine until it returns
	ended func()
}

// Keep lets the handler return before its work is done. ended must be called once, by any goroutine, when it is: until
// then the request's context lives, and Shutdown waits.
func (r *Request) Keep() (ended func()) {
	r.kept = true
	return r.ended
}

// Header returns the first value of a header (lower case), or "".
func (r *Request) Header(name string) string { return r.Headers.Get(name) }

var errAnswered = errors.New("request was answered before")

// Accept answers 200; what the client sends from now on is the returned stream's.
func (r *Request) Accept(header ...HeaderField) (*Stream, error) {
	if err := checkFields(header); err != nil {
		return nil, err
	}
	if r.s.answered.Swap(true) {
		return nil, errAnswered
	}
	if err := r.s.respond(200, header, 0); err != nil {
		return nil, opError("accept", r.s, err)
	}
	return r.s, nil
}

// Reject answers with an error status and no body. After an answer it does nothing.
func (r *Request) Reject(status int, header ...HeaderField) {
	if checkFields(header) != nil {
		header = nil // the status matters more
	}
	s := r.s
	if s.answered.Swap(true) {
		return
	}
	if s.respond(status, header, flagEndStream) == nil {
		s.finish(sendDone)
	}
	_ = s.Close()
}

// respond sends the response head.
func (s *Stream) respond(status int, header []HeaderField, flags byte) error {
	wider, asked := 0, false
	if flags&flagEndStream == 0 {
		wider, asked = s.widen(), s.asked()
	}
	w := s.t.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if s.sendErr != nil {
		return s.sendErr
	}
	if w.closed != nil {
		return w.closed
	}
	s.t.answers.Add(1)
	var a [512]byte
	b := w.beginBlockLocked(a[:0])
	b = appendStatus(b, status)
	for _, f := range header {
		b = appendField(b, f.Name, f.Value)
	}
	w.packHeadersLocked(s.id, b, flags)
	if flags&flagEndStream != 0 {
		s.sendClosed = true
	}
	if wider > 0 {
		w.packLocked(appendWindowUpdate(nil, s.id, wider))
	}
	switch {
	case asked && w.answers.awaited():
		w.attendLateLocked()
	case flags&flagEndStream == 0:
		w.flushTogetherLocked()
	default:
		w.attendLocked() // maybe by the tunnel's reader
	}
	return nil
}

// asked reports whether the client has asked the application something by now, and all that it had to ask: then the
// answer to it and that to the CONNECT may leave together.
func (s *Stream) asked() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buffered > 0 && s.buffered < EarlyLimit
}
