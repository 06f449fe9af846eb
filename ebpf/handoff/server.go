package handoff

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
)

const (
	// defaultAckTimeout is Istio's: a proxy that has not answered by then is
	// treated as gone, since a late answer would be taken for the next one's.
	defaultAckTimeout = 5 * time.Second

	// maxConns bounds proxies connected at once; an upgrade has two.
	maxConns = 8
)

// ServerConfig is the agent's side of the protocol.
type ServerConfig struct {
	Path       string
	AckTimeout time.Duration // for the hello and each ack; default 5 s
	Logger     *slog.Logger  // nil: none
	Registerer prometheus.Registerer

	// Admit is asked about each proxy that has greeted, before it is sent anything;
	// an error turns the proxy away. nil: all are welcome. Proxies that come at
	// the same time are asked about at the same time.
	Admit func(*Caller) error

	// SnapshotResult hears how a proxy that has just connected took each pod of
	// the snapshot. It must not block and must not call the Server.
	SnapshotResult func(uid string, err error)
}

// Server hands pods to the connected proxies.
type Server struct {
	cfg     ServerConfig
	ln      *net.UnixListener
	metrics *metrics

	mu     sync.Mutex
	pods   map[string]Pod // by UID; NS is our own duplicate, nil for "keep"
	conns  []*conn        // greeted ones, newest last
	slots  int            // accepted ones
	closed bool
}

// Listen makes the socket, for the owner only. Proxies are served once Run is
// called, which the agent does when it knows the node's pods: a proxy drains
// what the first snapshot does not name.
func Listen(cfg ServerConfig) (*Server, error) {
	if cfg.AckTimeout <= 0 {
		cfg.AckTimeout = defaultAckTimeout
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := removeStale(cfg.Path); err != nil {
		return nil, err
	}
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: cfg.Path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("listen for proxies: %w", err)
	}
	if err := os.Chmod(cfg.Path, 0o600); err != nil {
		_ = ln.Close() // err says more
		return nil, fmt.Errorf("restrict socket: %w", err)
	}
	return &Server{cfg: cfg, ln: ln, metrics: newMetrics(cfg.Registerer), pods: map[string]Pod{}}, nil
}

// removeStale removes the socket of an agent that is gone, and nothing else.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("inspect socket: %w", err)
	}
	if st.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("listen for proxies on %s: the path exists and is no socket", path)
	}
	c, err := net.Dial("unixpacket", path)
	if err == nil {
		_ = c.Close() // only asked whether someone listens
		return fmt.Errorf("listen for proxies on %s: another agent is listening there; stop it first", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("listen for proxies on %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	return nil
}

// Run serves proxies until ctx ends. It may be called once; afterwards every
// descriptor is closed.
func (s *Server) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	defer s.Close()
	stop := context.AfterFunc(ctx, func() { _ = s.ln.Close() })
	defer stop()
	var acceptErr error
	for {
		uc, err := s.ln.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				_ = uc.Close() // too late
			}
			break
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				acceptErr = fmt.Errorf("accept proxy: %w", err)
				break
			}
			// Out of descriptors or memory: others may give some back.
			s.cfg.Logger.Error("accept proxy", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond):
			}
			continue
		}
		if !s.admit() {
			s.cfg.Logger.Warn("proxy turned away: too many are connected", "limit", maxConns)
			_ = uc.Close() // nothing was said
			continue
		}
		g.Go(func() error {
			defer s.discharge()
			s.serve(ctx, uc)
			return nil
		})
	}
	return errors.Join(acceptErr, g.Wait())
}

func (s *Server) admit() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.slots >= maxConns {
		return false
	}
	s.slots++
	return true
}

func (s *Server) discharge() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slots--
}

// Close lets go of the socket and of all pods; Run does so at its end. A second
// Close does nothing.
func (s *Server) Close() {
	_ = s.ln.Close() // also removes the socket
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for uid, p := range s.pods {
		closePod(p)
		delete(s.pods, uid)
	}
}

// Track puts p into the snapshots of proxies that connect later, without telling
// those connected now. A pod without NS is one the agent knows but has no
// namespace of yet: a proxy that serves it already keeps it. p.NS stays the caller's.
func (s *Server) Track(p Pod) error {
	if p.UID == "" {
		return errors.New("hand off pod: no uid")
	}
	// Found here, an impossible message costs this pod; found while sending, it
	// would cost the connection.
	if data, err := proto.Marshal(addRequest(p).msg); err != nil {
		return fmt.Errorf("hand off pod %s: %w", p.UID, err)
	} else if len(data) > maxMessage {
		return fmt.Errorf("hand off pod %s: names too long: %d bytes, the protocol allows %d", p.UID, len(data), maxMessage)
	}
	if p.NS != nil {
		ns, err := p.NS.Dup()
		if err != nil {
			return fmt.Errorf("hand off pod %s: %w", p.UID, err)
		}
		p.NS = ns
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		closePod(p)
		return net.ErrClosed
	}
	if old, ok := s.pods[p.UID]; ok {
		closePod(old)
	}
	s.pods[p.UID] = p
	return nil
}

// Add tracks p and gives it to the newest proxy, waiting for its answer:
// ErrNoProxy if there is none, *RejectedError if it refused. Whatever Add
// returns, later proxies get p until Del. p.NS stays the caller's.
func (s *Server) Add(ctx context.Context, p Pod) error {
	if p.NS == nil {
		return fmt.Errorf("hand off pod %s: no network namespace", p.UID)
	}
	if err := s.Track(p); err != nil {
		return err
	}
	s.mu.Lock()
	var newest *conn
	if len(s.conns) > 0 {
		newest = s.conns[len(s.conns)-1]
	}
	s.mu.Unlock()
	if newest == nil {
		return ErrNoProxy
	}
	ns, err := p.NS.Dup()
	if err != nil {
		return fmt.Errorf("hand off pod %s: %w", p.UID, err)
	}
	p.NS = ns
	return newest.do(ctx, addRequest(p))
}

// Del forgets the pod and tells all proxies, waiting for their answers. With no
// proxy connected it is done at once: the next snapshot says the same.
func (s *Server) Del(ctx context.Context, uid string) error {
	s.mu.Lock()
	if p, ok := s.pods[uid]; ok {
		closePod(p)
		delete(s.pods, uid)
	}
	conns := append([]*conn(nil), s.conns...)
	s.mu.Unlock()
	errs := make([]error, len(conns))
	var wg sync.WaitGroup
	for i, c := range conns {
		wg.Go(func() { errs[i] = c.do(ctx, delRequest(uid)) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Connected reports whether a proxy has greeted and is still there.
func (s *Server) Connected() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns) > 0
}

// Peers returns the connected proxies, newest last.
func (s *Server) Peers() []Peer {
	s.mu.Lock()
	defer s.mu.Unlock()
	peers := make([]Peer, len(s.conns))
	for i, c := range s.conns {
		peers[i] = c.peer
	}
	return peers
}

// join makes c known and returns the snapshot it has to be sent, in one step, so
// that no change is missed or sent twice in the wrong order.
func (s *Server) join(c *conn) ([]Pod, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	pods := make([]Pod, 0, len(s.pods))
	for _, p := range s.pods {
		if p.NS != nil {
			ns, err := p.NS.Dup()
			if err != nil {
				for _, d := range pods {
					closePod(d)
				}
				return nil, fmt.Errorf("prepare snapshot: %w", err)
			}
			p.NS = ns
		}
		pods = append(pods, p)
	}
	s.conns = append(s.conns, c)
	s.metrics.connected.Set(float64(len(s.conns)))
	return pods, nil
}

func (s *Server) leave(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, o := range s.conns {
		if o == c {
			s.conns = append(s.conns[:i:i], s.conns[i+1:]...)
			break
		}
	}
	s.metrics.connected.Set(float64(len(s.conns)))
}

func closePod(p Pod) {
	if p.NS != nil {
		_ = p.NS.Close() // only ever passed on
	}
}
