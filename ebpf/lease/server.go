package lease

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	wire "github.com/ambit-mesh/ambit/xds/api/lease"
)

const (
	// maxConns bounds proxies connected at once; an upgrade has two.
	maxConns = 4
	// maxEvents bounds what waits for a proxy to read; one that reads no more has
	// its leases ended.
	maxEvents = 65536
	// A proxy connects here and to ZDS at the same time.
	admitTries = 20
	admitPause = 100 * time.Millisecond
	// writeTimeout is when a proxy that reads nothing counts as gone.
	writeTimeout = 5 * time.Second
)

// ServerConfig is the agent's side.
type ServerConfig struct {
	Path   string
	Holder Holder
	// Admit says whether a process is the node's proxy.
	Admit  func(handoff.Peer) error
	Logger *slog.Logger // nil: none

	Registerer prometheus.Registerer
}

// Server takes requests of proxies.
type Server struct {
	cfg     ServerConfig
	ln      *net.UnixListener
	metrics *metrics
}

// Listen makes the socket, for the owner only.
func Listen(cfg ServerConfig) (*Server, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := removeStale(cfg.Path); err != nil {
		return nil, err
	}
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: cfg.Path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("listen for leases: %w", err)
	}
	if err := os.Chmod(cfg.Path, 0o600); err != nil {
		_ = ln.Close() // err says more
		return nil, fmt.Errorf("restrict lease socket: %w", err)
	}
	return &Server{cfg: cfg, ln: ln, metrics: newMetrics(cfg.Registerer)}, nil
}

// removeStale removes the socket of an agent that is gone, and nothing else.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("inspect lease socket: %w", err)
	}
	if st.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("listen for leases on %s: the path exists and is no socket", path)
	}
	if c, err := net.Dial("unixpacket", path); err == nil {
		_ = c.Close() // only asked whether someone listens
		return fmt.Errorf("listen for leases on %s: another agent is listening there; stop it first", path)
	} else if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("listen for leases on %s: %w", path, err)
	}
	return os.Remove(path)
}

// Close lets go of the socket; Run does so at its end.
func (s *Server) Close() { _ = s.ln.Close() }

// Run serves proxies until ctx ends. What they were granted then holds for TTL,
// for the next agent to take over.
func (s *Server) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	defer s.Close()
	stop := context.AfterFunc(ctx, s.Close)
	defer stop()
	slots := make(chan struct{}, maxConns)
	for {
		c, err := s.ln.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil {
			// Out of descriptors or memory: others may give some back.
			s.cfg.Logger.Error("accept proxy for leases", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond):
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			s.cfg.Logger.Warn("proxy turned away: too many are connected for leases", "limit", maxConns)
			_ = c.Close() // nothing was said
			continue
		}
		g.Go(func() error {
			defer func() { <-slots }()
			s.serve(ctx, c)
			return nil
		})
	}
	return g.Wait()
}

func (s *Server) serve(ctx context.Context, c *net.UnixConn) {
	defer c.Close()
	peer, err := handoff.PeerOf(c)
	if err == nil {
		err = s.admit(ctx, peer)
	}
	if err != nil {
		s.cfg.Logger.Warn("a process that asked for leases was turned away", "peer_pid", peer.PID, "err", err)
		return
	}
	log := s.cfg.Logger.With("peer_pid", peer.PID)
	ss := &serverSession{conn: c, holder: s.cfg.Holder, metrics: s.metrics, eventc: make(chan proto.Message, maxEvents), donec: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	log.Info("proxy connected for leases")
	wrotec := make(chan struct{})
	go func() { defer close(wrotec); ss.write() }()
	err = ss.run()
	close(ss.donec)
	_ = c.Close() // ends write
	<-wrotec
	if ctx.Err() != nil {
		return // the next agent takes over
	}
	s.cfg.Holder.Abandon(ss)
	s.metrics.live.Add(-ss.live.Swap(0)) // nobody tells it any more
	log.Warn("proxy's leases have ended: it disconnected", "err", err)
}

// admit gives a proxy that has just come a moment to be known.
func (s *Server) admit(ctx context.Context, p handoff.Peer) (err error) {
	for range admitTries {
		if err = s.cfg.Admit(p); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(admitPause):
		}
	}
	return err
}

// serverSession is one proxy's connection, and the owner of its leases.
type serverSession struct {
	conn    *net.UnixConn
	holder  Holder
	metrics *metrics
	live    atomic.Int64 // of metrics.live, its own
	eventc  chan proto.Message
	donec   chan struct{}
}

func (s *serverSession) run() error {
	buf := make([]byte, maxMessage)
	for {
		req := &wire.Request{}
		if err := read(s.conn, buf, req); err != nil {
			return err
		}
		err := s.handle(req)
		if perr, ok := errors.AsType[*ProtocolError](err); ok {
			return perr
		}
		a := &wire.Answer{}
		if err != nil {
			_, a.Refused = errors.AsType[*RefusedError](err)
			a.Error = clip(err.Error())
		}
		s.send(&wire.Event{Payload: &wire.Event_Answer{Answer: a}})
	}
}

func clip(s string) string { return s[:min(len(s), maxMessage/2)] }

func (s *serverSession) handle(req *wire.Request) error {
	switch p := req.GetPayload().(type) {
	case *wire.Request_Grant:
		g, err := grantOf(p.Grant)
		if err != nil {
			return err
		}
		return s.holder.Grant(s, g)
	case *wire.Request_Renew:
		return s.holder.Renew(s)
	case *wire.Request_Cut:
		return s.holder.Cut(s, p.Cut.GetConnection())
	}
	return &ProtocolError{"message of unknown kind"}
}

// Opened implements Events.
func (s *serverSession) Opened(o Opened) {
	s.metrics.live.Add(1)
	s.live.Add(1)
	s.send(o.message())
}

// Closed implements Events.
func (s *serverSession) Closed(c Closed) {
	s.metrics.live.Add(-1)
	s.live.Add(-1)
	if c.Lost {
		s.metrics.lost.Inc()
	}
	s.send(c.message())
}

// send never blocks: a proxy that leaves so much unread is as good as gone.
func (s *serverSession) send(m proto.Message) {
	select {
	case s.eventc <- m:
	default:
		_ = s.conn.Close() // run ends
	}
}

func (s *serverSession) write() {
	for {
		select {
		case <-s.donec:
			return
		case m := <-s.eventc:
			_ = s.conn.SetWriteDeadline(time.Now().Add(writeTimeout)) // fails only when closed; the write says so
			if err := write(s.conn, m); err != nil {
				_ = s.conn.Close() // run ends
				return
			}
		}
	}
}
