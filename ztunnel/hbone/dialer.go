package hbone

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

// Dialer opens CONNECT streams in pooled tunnels. All methods may be called from any goroutine.
type Dialer struct {
	cfg DialerConfig
	met *metrics

	mu     sync.Mutex
	sets   map[Key]*tunnelSet // guarded by mu
	closed bool               // guarded by mu
	wg     sync.WaitGroup     // readers and dials
}

func (c DialerConfig) withDefaults() DialerConfig {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&c.IdleTimeout, 5*time.Minute)
	def(&c.DialTimeout, 10*time.Second)
	def(&c.HandshakeTimeout, 10*time.Second)
	def(&c.ConnectTimeout, 10*time.Second)
	if c.MaxStreams == 0 {
		c.MaxStreams = assumedMaxStreams
	}
	if c.MaxTunnels == 0 {
		c.MaxTunnels = 4
	}
	if c.Account == nil {
		c.Account = func(Key) *ledger.Account { return nil }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// NewDialer returns a Dialer without tunnels.
func NewDialer(cfg DialerConfig) *Dialer {
	return &Dialer{cfg: cfg.withDefaults(), met: newMetrics(cfg.Registerer), sets: make(map[Key]*tunnelSet)}
}

// Connect asks the peer at k.Addr for a tunnel to r.Authority and waits for its answer. A *StatusError is the peer's
// refusal, a *DialError anything before it. Requests that certainly were not processed are tried once more.
func (d *Dialer) Connect(ctx context.Context, k Key, r ConnectRequest) (*Stream, *ConnectResponse, error) {
	set, err := d.enter(k)
	if err != nil {
		return nil, nil, err
	}
	defer d.leave(set)
	account := set.account
	if err := account.Acquire(ctx, ledger.Streams, 1); err != nil {
		return nil, nil, &DialError{StageLocal, k.Addr, err}
	}
	for retried := false; ; retried = true {
		t, reused, err := set.acquire(ctx, r)
		if err != nil {
			account.Release(ledger.Streams, 1)
			return nil, nil, err
		}
		s, resp, err := d.connect(ctx, t, r)
		if err == nil {
			resp.Reused = reused
			d.met.streams.Inc()
			return s, resp, nil
		}
		if s == nil {
			account.Release(ledger.Streams, 1) // otherwise the stream did
		}
		if _, ok := errors.AsType[*StatusError](err); ok {
			return nil, resp, err
		}
		spoken := s != nil && s.early > 0
		if retried || ctx.Err() != nil || !errors.Is(err, errRefused) && (spoken || !reused || !isLost(err)) {
			return nil, nil, &DialError{StageConnect, k.Addr, err}
		}
		d.met.retries.Inc()
		if err := account.Acquire(ctx, ledger.Streams, 1); err != nil {
			return nil, nil, &DialError{StageLocal, k.Addr, err}
		}
	}
}

// isLost reports whether a tunnel ended under a request: pooled tunnels may have died unnoticed.
func isLost(err error) bool {
	if _, ok := errors.AsType[*lostError](err); ok {
		return true
	}
	_, ok := errors.AsType[*ConnError](err)
	return ok
}

// connect sends CONNECT on t and waits for the answer.
func (d *Dialer) connect(ctx context.Context, t *tunnel, r ConnectRequest) (*Stream, *ConnectResponse, error) {
	s, err := t.open(r, r.early(t))
	if err != nil {
		if t.isGone() && r.elsewhere() {
			err = ErrGone // not the same address again
		}
		return nil, nil, err
	}
	if err := s.awaitAnswer(ctx, d.cfg.ConnectTimeout, r); err != nil {
		s.abort(CodeCancel)
		return s, nil, err
	}
	if s.resp == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.recvErr != nil {
			return s, nil, s.recvErr
		}
		if s.early > 0 {
			return s, nil, errUnanswered
		}
		return s, nil, errRefused
	}
	resp := &ConnectResponse{
		Status: s.resp.status, Header: s.resp.fields,
		Peer: t.peer, TLS: t.state, LocalAddr: t.local, RemoteAddr: t.remote,
		Early: int(s.early),
	}
	switch {
	case s.resp.tooLarge:
		s.abort(CodeCancel)
		return s, nil, errors.New("response headers too large")
	case resp.Status != 200:
		_ = s.Close()
		return s, resp, &StatusError{Code: resp.Status}
	}
	return s, resp, nil
}

// dial opens one tunnel. The context carries cancellation of the set, not of whoever asked first: others may wait.
func (d *Dialer) dial(ctx context.Context, set *tunnelSet, dg *dialing) (t *tunnel, err error) {
	k, account := set.key, set.account
	stage := StageLocal
	defer func() {
		d.met.dial(stage, err)
		if _, beyond := errors.AsType[*GatewayError](err); err == nil || beyond {
			return
		}
		if k.Gateway != (Gateway{}) {
			err = fmt.Errorf("inner tunnel to %s: %w", k.Gateway.Authority, err)
		}
		err = &DialError{stage, k.Addr, err}
	}()
	if err := account.Acquire(ctx, ledger.Connections, 1); err != nil {
		return nil, err
	}
	releaseConn := func() { account.Release(ledger.Connections, 1) }

	stage = StageTLS
	cfg, err := d.configuration(ctx, k)
	if err != nil {
		releaseConn()
		return nil, err
	}
	stage = StageTCP
	conn, err := d.dialTransport(ctx, k, account, dg)
	if err != nil {
		releaseConn()
		return nil, err
	}
	stage = StageTLS
	t, err = d.secure(ctx, set, conn, cfg)
	d.met.handshake(clientSide, err)
	if err != nil {
		_ = conn.Close()
		releaseConn()
		return nil, err
	}
	stage = StageH2
	d.wg.Add(1)
	go func() {
		defer d.wg.Done()
		defer releaseConn()
		defer t.opened(d.cfg.Opened)()
		defer d.met.open(clientSide)()
		_ = t.run() // its streams have been told
	}()
	if err := t.awaitSettings(ctx); err != nil {
		t.cut(err)
		return nil, err
	}
	return t, nil
}

func (d *Dialer) dialTransport(ctx context.Context, k Key, account *ledger.Account, dg *dialing) (net.Conn, error) {
	if k.Gateway != (Gateway{}) {
		return d.dialGateway(ctx, k)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, d.cfg.DialTimeout, os.ErrDeadlineExceeded)
	defer cancel()
	if err := account.Acquire(ctx, ledger.Dials, 1); err != nil {
		return nil, err
	}
	defer account.Release(ledger.Dials, 1)
	dg.called.Store(time.Now().UnixNano())
	defer dg.called.Store(0)
	return d.cfg.DialTransport(ctx, k)
}

// configuration may wait for our certificate, so it comes first: a peer's bound on handshakes is not for our CA's delays.
func (d *Dialer) configuration(ctx context.Context, k Key) (*tls.Config, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, d.cfg.HandshakeTimeout, os.ErrDeadlineExceeded)
	defer cancel()
	return d.cfg.TLS(ctx, k)
}

// secure completes TLS and sends our preface. The deadline set here ends with the peer's SETTINGS.
func (d *Dialer) secure(ctx context.Context, set *tunnelSet, conn net.Conn, cfg *tls.Config) (*tunnel, error) {
	account := set.account
	ctx, cancel := context.WithTimeoutCause(ctx, d.cfg.HandshakeTimeout, os.ErrDeadlineExceeded)
	defer cancel()
	if err := account.Acquire(ctx, ledger.Handshakes, 1); err != nil {
		return nil, err
	}
	defer account.Release(ledger.Handshakes, 1)
	if err := conn.SetDeadline(time.Now().Add(d.cfg.HandshakeTimeout)); err != nil {
		return nil, err
	}
	rc, state, err := clientRecords(ctx, conn, cfg, d.cfg.AmbitRecords, account)
	if err != nil {
		return nil, err
	}
	t := newTunnel(rc, conn, state, d.cfg.Windows)
	t.info.met = d.met
	t.client, t.set, t.limit, t.log = true, set, d.cfg.MaxStreams, d.cfg.Logger
	t.bind(account)
	t.gonec = make(chan struct{})
	t.notAfter = set.key.notAfter(earliestExpiry(cfg, state), time.Now())
	t.in.configure(clientMaxHeader)
	t.hello(0, clientMaxHeader)
	return t, nil
}

// earliestExpiry is when the first of both leaves expires: after that no new stream may rely on them.
func earliestExpiry(cfg *tls.Config, state *tls.ConnectionState) time.Time {
	var at time.Time
	consider := func(c *x509.Certificate) {
		if c != nil && (at.IsZero() || c.NotAfter.Before(at)) {
			at = c.NotAfter
		}
	}
	if len(state.PeerCertificates) > 0 {
		consider(state.PeerCertificates[0])
	}
	if len(cfg.Certificates) > 0 {
		consider(cfg.Certificates[0].Leaf)
	}
	return at
}

// enter finds or makes the set of k and keeps it from being forgotten until leave.
func (d *Dialer) enter(k Key) (*tunnelSet, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, ErrDialerClosed
	}
	set := d.sets[k]
	if set == nil {
		set = newTunnelSet(d, k)
		d.sets[k] = set
	}
	set.users++
	return set, nil
}

func (d *Dialer) leave(set *tunnelSet) {
	d.mu.Lock()
	defer d.mu.Unlock()
	set.users--
	d.forgetLocked(set)
}

// forgetLocked drops a set that nobody uses and that holds nothing.
func (d *Dialer) forgetLocked(set *tunnelSet) {
	if set.users == 0 && set.empty() && d.sets[set.key] == set {
		delete(d.sets, set.key)
	}
}

func (d *Dialer) matching(match func(Key) bool) []*tunnelSet {
	d.mu.Lock()
	defer d.mu.Unlock()
	var sets []*tunnelSet
	for k, set := range d.sets {
		if match(k) {
			sets = append(sets, set)
		}
	}
	return sets
}

// ClosePod cuts all tunnels of a pod that is gone.
func (d *Dialer) ClosePod(pod string) {
	for _, set := range d.matching(func(k Key) bool { return k.Pod == pod }) {
		set.cut(ErrTunnelClosed)
	}
}

// CloseMatching lets no new streams into the tunnels of matching keys; their streams go on to their end.
func (d *Dialer) CloseMatching(match func(Key) bool) {
	for _, set := range d.matching(match) {
		set.drain()
	}
}

// Shutdown lets no new streams in and waits for those that are open; when ctx ends first, it cuts them.
func (d *Dialer) Shutdown(ctx context.Context) error {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.CloseMatching(func(Key) bool { return true })
	donec := make(chan struct{})
	go func() {
		defer close(donec)
		d.wg.Wait()
	}()
	select {
	case <-donec:
		return nil
	case <-ctx.Done():
		_ = d.Close()
		<-donec
		return context.Cause(ctx)
	}
}

// Close cuts all tunnels and waits until their goroutines are gone.
func (d *Dialer) Close() error {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	for _, set := range d.matching(func(Key) bool { return true }) {
		set.cut(ErrDialerClosed)
	}
	d.wg.Wait()
	return nil
}
