package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
)

// Handler is the agent.
type Handler interface {
	// Admit returns when the pod may start, and whether it is in the mesh.
	Admit(ctx context.Context, a Attachment) (inMesh bool, why string, err error)
	// Attach takes note of a pod that does not wait to be admitted.
	Attach(ctx context.Context, a Attachment) error
	// Detach forgets an attachment. One that is not known is no error.
	Detach(ctx context.Context, a Attachment) error
	// Check reports what is wrong with the pod's redirection.
	Check(ctx context.Context, a Attachment) (inMesh bool, why string, err error)
	// Collect forgets the network's attachments that are not valid any more.
	Collect(ctx context.Context, network string, valid []string) error
	// Ready reports what keeps Admit from deciding.
	Ready() error
}

const (
	// requestTimeout is for the bytes of a request, which a plugin sends at once.
	requestTimeout = 5 * time.Second
	// maxWait bounds what a plugin may ask for. A runtime gives up after two to four
	// minutes.
	maxWait = 4 * time.Minute
	// maxConns bounds plugins served at once: each waits for its pod, and a node
	// has a few hundred.
	maxConns = 1024
)

// ServerConfig is the agent's side.
type ServerConfig struct {
	Path    string
	Handler Handler
	Logger  *slog.Logger // nil: none

	Registerer prometheus.Registerer
}

// Server answers plugins.
type Server struct {
	cfg     ServerConfig
	ln      net.Listener
	slots   chan struct{}
	metrics *metrics
}

// Listen makes the socket, for root only.
func Listen(cfg ServerConfig) (*Server, error) {
	if err := os.MkdirAll(filepath.Dir(cfg.Path), 0o755); err != nil {
		return nil, fmt.Errorf("make directory of the CNI socket: %w", err)
	}
	if err := removeStale(cfg.Path); err != nil {
		return nil, err
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: cfg.Path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for the CNI plugin: %w", err)
	}
	if err := os.Chmod(cfg.Path, 0o600); err != nil {
		_ = ln.Close() // err says more
		return nil, fmt.Errorf("restrict CNI socket: %w", err)
	}
	return Serve(ln, cfg), nil
}

// Serve answers on a listener that the caller made.
func Serve(ln net.Listener, cfg ServerConfig) *Server {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg, ln: ln, slots: make(chan struct{}, maxConns), metrics: newMetrics(cfg.Registerer)}
}

// removeStale removes the socket of an agent that is gone, and nothing else.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("inspect CNI socket: %w", err)
	}
	if st.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("listen for the CNI plugin on %s: the path exists and is no socket", path)
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		_ = c.Close() // only asked whether someone listens
		return fmt.Errorf("listen for the CNI plugin on %s: another agent is listening there; stop it first, or give each its own --cni-socket", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("listen for the CNI plugin on %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove stale CNI socket: %w", err)
	}
	return nil
}

// Close lets go of the socket, for a Server that does not Run.
func (s *Server) Close() { _ = s.ln.Close() }

// Run serves plugins until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, s.Close)
	defer stop()
	var failure error
	for {
		conn, err := s.ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close() // too late
			}
			break
		}
		if errors.Is(err, net.ErrClosed) {
			failure = fmt.Errorf("accept CNI plugin: %w", err)
			break
		}
		if err != nil {
			// Out of descriptors or memory: others may give some back.
			s.cfg.Logger.Error("accept CNI plugin", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond):
			}
			continue
		}
		select {
		case s.slots <- struct{}{}:
		default:
			s.cfg.Logger.Warn("CNI plugin turned away: too many wait", "limit", maxConns)
			_ = conn.Close() // it asks again
			continue
		}
		g.Go(func() error {
			defer func() { <-s.slots }()
			s.serve(ctx, conn)
			return nil
		})
	}
	s.Close()
	return errors.Join(failure, g.Wait())
}

// serve answers one request.
func (s *Server) serve(ctx context.Context, conn net.Conn) {
	defer func() { _ = conn.Close() }() // the answer is written, or nobody reads it
	// The end of the agent must not wait for a plugin that sends nothing.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	_ = conn.SetReadDeadline(time.Now().Add(requestTimeout)) // a dead connection fails in read
	var r Request
	if err := read(conn, &r); err != nil {
		if ctx.Err() == nil {
			s.cfg.Logger.Warn("request on the CNI socket", "err", err)
		}
		return
	}
	wait := maxWait
	if !r.Deadline.IsZero() {
		wait = min(time.Until(r.Deadline), maxWait)
	}
	work, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	_ = conn.SetReadDeadline(time.Time{})
	var watch sync.WaitGroup
	if ctx.Err() == nil { // or the deadline that ends reading was overwritten just now
		watch.Go(func() {
			_, _ = conn.Read(make([]byte, 1)) // nothing more is sent: it returns when the plugin is gone, or at the end
			cancel()
		})
	}
	a := s.answer(work, r)
	if ctx.Err() == nil || a.Refusal == nil {
		_ = conn.SetWriteDeadline(time.Now().Add(requestTimeout))
		if err := write(conn, a); err != nil {
			s.cfg.Logger.Info("the CNI plugin did not wait for its answer", "command", string(r.Command), "pod", r.Attachment.Pod(), "err", err)
		}
	}
	_ = conn.SetReadDeadline(time.Unix(1, 0)) // ends the watch
	watch.Wait()
}

func (s *Server) answer(ctx context.Context, r Request) Answer {
	var a Answer
	var err error
	began := time.Now()
	switch r.Command {
	case Add, Tell, Check:
		if err = r.Attachment.Validate(); err != nil {
			err = &Refusal{Message: "the container runtime's words about the pod cannot be used", Details: err.Error(), Final: true}
		} else if ctx.Err() != nil {
			err = &Refusal{Message: "the node agent read the request too late", Unready: true} // nothing was said of the pod
		} else if r.Command == Tell {
			err = s.cfg.Handler.Attach(ctx, r.Attachment)
		} else if r.Command == Add {
			a.InMesh, a.Why, err = s.cfg.Handler.Admit(ctx, r.Attachment)
		} else {
			a.InMesh, a.Why, err = s.cfg.Handler.Check(ctx, r.Attachment)
		}
	case Del:
		err = s.cfg.Handler.Detach(ctx, r.Attachment)
	case GC:
		err = s.cfg.Handler.Collect(ctx, r.Attachment.Network, r.Valid)
	case Status:
		err = s.cfg.Handler.Ready()
	default:
		err = &Refusal{
			Message: fmt.Sprintf("the node agent does not know the command %.40q", string(r.Command)),
			Details: "it is older than the CNI plugin: upgrade it", Final: true,
		}
	}
	defer func() { s.metrics.answered(r.Command, a, time.Since(began)) }()
	if err != nil {
		refusal, ok := errors.AsType[*Refusal](err)
		if !ok {
			refusal = &Refusal{Message: err.Error()}
		}
		a.Refusal = refusal
		s.cfg.Logger.Warn("CNI request refused", "command", string(r.Command), "pod", r.Attachment.Pod(), "uid", r.Attachment.UID, "err", err)
	} else if r.Command == Add {
		s.cfg.Logger.Info("pod may start", "pod", r.Attachment.Pod(), "uid", r.Attachment.UID, "in_mesh", a.InMesh, "why", a.Why, "waited", time.Since(began).Round(time.Millisecond))
	}
	return a
}
