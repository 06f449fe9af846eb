package mesh

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ambit-mesh/ambit/test/lab/fabric"
	"github.com/ambit-mesh/ambit/test/lab/process"
)

// Component is one program of the mesh and its process.
type Component struct {
	Name    string // ambitd, ztunnel@node-1
	Machine *fabric.Machine
	LogFile string

	argv, env []string
	next      []string       // environment of every second process of a rollout: other ports for admin and readiness
	ready     netip.AddrPort // of the first process of a rollout; the next one is sideStep further
	path      string
	mounts    []process.Mount // over the machine's own files
	cgroup    string          // directory above its processes' cgroups, each of which has one of its own; "": none
	log       *slog.Logger
	wakec     chan syscall.Signal // ends the wait before a restart
	rollc     chan rollout

	wasReady atomic.Bool
	starts   atomic.Int64 // numbers cgroups

	mu       sync.Mutex
	proc     *process.Process // guarded by mu; nil before the first start
	restarts int              // guarded by mu
	side     bool             // guarded by mu: proc is a second process
}

// sideStep lies between the ports of two processes that run at the same time.
const sideStep = 100

// rollout asks for a successor that is ready before its predecessor is told to end.
type rollout struct {
	ctx   context.Context
	donec chan<- error
}

// run starts the program, and again when it ends, until ctx ends.
func (c *Component) run(ctx context.Context) {
	const first, last = 200 * time.Millisecond, 5 * time.Second
	var leaving sync.WaitGroup
	defer leaving.Wait()
	for backoff := first; ; {
		began := time.Now()
		p, err := c.start(c.onSide())
		if err != nil {
			c.log.Warn("component does not start", "component", c.Name, "err", err)
		} else {
			c.publish(p, c.onSide())
			p = c.watch(ctx, p, &leaving)
			if p == nil {
				return
			}
			code, _ := p.Exit()
			c.log.Info("component ended", "component", c.Name, "code", code)
			c.mu.Lock()
			c.restarts++
			c.mu.Unlock()
		}
		if time.Since(began) > 10*time.Second {
			backoff = first
		}
		select {
		case <-time.After(backoff):
		case <-c.wakec:
		case <-ctx.Done():
			return
		}
		backoff = min(2*backoff, last)
	}
}

// watch returns the process that ended, or nil when ctx did. A rollout replaces
// the process meanwhile.
func (c *Component) watch(ctx context.Context, p *process.Process, leaving *sync.WaitGroup) *process.Process {
	for {
		select {
		case <-p.Done():
			return p
		case <-ctx.Done():
			p.Stop(3 * time.Second)
			return nil
		case r := <-c.rollc:
			next, err := c.succeed(r.ctx)
			if err == nil {
				old := p
				p = next
				_ = old.Signal(syscall.SIGTERM) // it may have ended by itself
				leaving.Go(func() {
					select {
					case <-old.Done():
					case <-ctx.Done():
						old.Stop(3 * time.Second)
					}
				})
			}
			r.donec <- err
		}
	}
}

// succeed starts a process beside the one that runs and waits until it is ready.
func (c *Component) succeed(ctx context.Context) (*process.Process, error) {
	side := !c.onSide()
	p, err := c.start(side)
	if err != nil {
		return nil, err
	}
	for {
		_, err := c.get(ctx, c.address(c.ready, side), c.path)
		if err == nil {
			c.publish(p, side)
			return p, nil
		}
		select {
		case <-p.Done():
			return nil, fmt.Errorf("the next process of %s ended before it was ready: %w; its last log lines:\n%s", c.Name, err, c.Tail(15))
		case <-ctx.Done():
			p.Stop(0)
			return nil, fmt.Errorf("the next process of %s is not ready: %w", c.Name, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Roll replaces the process as a rolling update does: the next one serves before
// the old one is told to end.
func (c *Component) Roll(ctx context.Context) error {
	if c.next == nil {
		return fmt.Errorf("%s is not rolled out; restart it", c.Name)
	}
	donec := make(chan error, 1)
	select {
	case c.rollc <- rollout{ctx, donec}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return <-donec
}

func (c *Component) publish(p *process.Process, side bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.proc, c.side = p, side
}

func (c *Component) onSide() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.side
}

// address is where a process listens that would listen at the given one.
func (c *Component) address(first netip.AddrPort, side bool) netip.AddrPort {
	if side {
		return netip.AddrPortFrom(first.Addr(), first.Port()+sideStep)
	}
	return first
}

func (c *Component) start(side bool) (*process.Process, error) {
	log, err := os.OpenFile(c.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	env := c.env
	if side {
		env = append(slices.Clip(env), c.next...)
	}
	cgroup := ""
	if c.cgroup != "" {
		program, _, _ := strings.Cut(c.Name, "@")
		cgroup = filepath.Join(c.cgroup, fmt.Sprintf("%s-%d", program, c.starts.Add(1)))
	}
	return process.Start(process.Spec{Argv: c.argv, Env: env, NetNS: c.Machine.Path(), Cgroup: cgroup, Once: true,
		Private: len(c.mounts) > 0, Mounts: c.mounts}, nil, log, log)
}

// Pid is the running process's, 0 when there is none.
func (c *Component) Pid() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.proc == nil {
		return 0
	}
	select {
	case <-c.proc.Done():
		return 0
	default:
		return c.proc.Pid()
	}
}

// Restarts counts how often the program was started again.
func (c *Component) Restarts() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.restarts
}

// Signal sends a signal to the program.
func (c *Component) Signal(sig syscall.Signal) error {
	c.mu.Lock()
	p := c.proc
	c.mu.Unlock()
	if p == nil {
		return fmt.Errorf("%s does not run", c.Name)
	}
	return p.Signal(sig)
}

// Restart ends the program and waits until another process runs.
func (c *Component) Restart(ctx context.Context, sig syscall.Signal) error {
	before := c.Restarts()
	if err := c.Signal(sig); err != nil {
		return err
	}
	for c.Restarts() == before || c.Pid() == 0 {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// Check asks the program whether it is ready.
func (c *Component) Check(ctx context.Context) error {
	if c.Pid() == 0 {
		return fmt.Errorf("no process (restarted %d times)", c.Restarts())
	}
	if _, err := c.get(ctx, c.address(c.ready, c.onSide()), c.path); err != nil {
		return err
	}
	c.wasReady.Store(true)
	return nil
}

// Tail returns the last lines of the program's log.
func (c *Component) Tail(n int) string {
	b, err := os.ReadFile(c.LogFile)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}

// output runs ambitd for its standard output.
func (m *Mesh) output(ctx context.Context, args ...string) (string, error) {
	out, in, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer out.Close()
	errFile, err := os.CreateTemp(m.Dir, "output-")
	if err != nil {
		_ = in.Close()
		return "", err
	}
	defer os.Remove(errFile.Name())
	defer errFile.Close()
	p, err := process.Start(process.Spec{Argv: append([]string{filepath.Join(m.Bin, "ambitd")}, args...), Env: os.Environ()}, nil, in, errFile)
	_ = in.Close() // the process has its own
	if err != nil {
		return "", err
	}
	stop := context.AfterFunc(ctx, func() { p.Stop(0) })
	defer stop()
	var b bytes.Buffer
	if _, err := io.Copy(&b, out); err != nil {
		return "", err
	}
	<-p.Done()
	if code, _ := p.Exit(); code != 0 {
		said, _ := os.ReadFile(errFile.Name()) // the exit status is told in any case
		return "", fmt.Errorf("ambitd %s: exit status %d: %s", args[0], code, bytes.TrimSpace(said))
	}
	return b.String(), nil
}
