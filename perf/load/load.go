// Package load is what a measurement runs inside pods and nodes: the server, the
// client that makes one load and measures it, the plain hops that a mesh is
// compared with, and the look at the wire that tells what TLS was agreed on.
//
//	client pod                       node        node          server pod
//	Run(Spec) ── Dial ──▶ whatever the mode puts in between ──▶ Serve
//
// A client warms up, then measures between two looks at the clock, the processes
// and the machine; counts are read at the same moments, so that a late timer
// stretches a window and falsifies nothing. One goroutine or thread per connection
// owns its counter and histogram; they are summed when all have ended.
package load

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// Kinds of load.
const (
	Up      = "bulk-up"   // the client writes as fast as it can
	Down    = "bulk-down" // the server does
	Ask     = "ask"       // request and response, the next when the last is answered
	Connect = "connect"   // connect, request, response, close
	Rate    = "rate"      // requests at fixed times, whether or not earlier ones are answered
	Idle    = "idle"      // connections that do nothing after one request
)

// Spec is one load.
type Spec struct {
	Kind    string        `json:"kind"`
	Server  string        `json:"server"`
	Conns   int           `json:"conns"`
	Size    int           `json:"size,omitempty"` // bytes of a write, or of a request and of its response
	PerSec  int           `json:"perSec,omitempty"`
	Warm    time.Duration `json:"warm"`
	For     time.Duration `json:"for"`
	Watch   []Process     `json:"watch,omitempty"` // processes to measure
	Timeout time.Duration `json:"timeout"`         // of a dial
	Label   string        `json:"-"`               // names this run among others
}

// Result is what one load measured.
type Result struct {
	Elapsed time.Duration `json:"elapsed"`
	Ops     uint64        `json:"ops"`   // requests or connections completed
	Bytes   uint64        `json:"bytes"` // of payload, in the measured direction
	Errors  uint64        `json:"errors"`
	Error   string        `json:"error,omitempty"`   // the first of them
	Latency *Histogram    `json:"latency,omitempty"` // nanoseconds
	Usage   []Usage       `json:"usage,omitempty"`   // in the order of Spec.Watch, the client itself last
	Machine Machine       `json:"machine"`
}

// Validate says what is wrong with a spec.
func (s Spec) Validate() error {
	switch {
	case s.Kind != Up && s.Kind != Down && s.Kind != Ask && s.Kind != Connect && s.Kind != Rate && s.Kind != Idle:
		return fmt.Errorf("kind %q: want %s, %s, %s, %s, %s or %s", s.Kind, Up, Down, Ask, Connect, Rate, Idle)
	case s.Conns < 1:
		return fmt.Errorf("conns %d: want at least one", s.Conns)
	case s.Size < headerSize || s.Size > maxSize:
		return fmt.Errorf("size %d: want %d to %d", s.Size, headerSize, maxSize)
	case s.For <= 0:
		return fmt.Errorf("for %s: want a positive time", s.For)
	case s.Kind == Rate && s.PerSec < s.Conns:
		return fmt.Errorf("perSec %d: want at least one request per connection and second", s.PerSec)
	}
	return nil
}

// The header with which a client opens each connection: what it wants, and the
// size of its writes or requests.
const (
	headerSize = 5
	maxSize    = 16 << 20

	verbSink   = 'u' // take everything
	verbSource = 'd' // send blocks of that size
	verbAnswer = 'r' // answer requests of that size with as much; the header is part of the first
)

// open makes the first bytes of a connection: a header, filled up to size.
func open(verb byte, size int) []byte {
	b := make([]byte, size)
	b[0] = verb
	binary.BigEndian.PutUint32(b[1:], uint32(size))
	return b
}

// worker is one connection's part. Ops and bytes are read by others meanwhile.
type worker struct {
	ops, bytes atomic.Uint64
	hist       Histogram
	_          [64]byte // the next worker's counters are on another cache line
}

// run is a load in progress.
type run struct {
	Spec
	ctx       context.Context
	measuring atomic.Bool
	ended     atomic.Bool
	workers   []worker

	mu     sync.Mutex
	conns  map[net.Conn]bool // open ones; guarded by mu
	errors uint64            // guarded by mu
	first  string            // guarded by mu
}

// Run makes a load and measures it.
func Run(ctx context.Context, s Spec) (Result, error) {
	if s.Timeout <= 0 {
		s.Timeout = 5 * time.Second
	}
	if err := s.Validate(); err != nil {
		return Result{}, err
	}
	debug.SetGCPercent(400) // loads allocate next to nothing; none of it should cost others
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := &run{Spec: s, ctx: ctx, workers: make([]worker, s.Conns), conns: map[net.Conn]bool{}}
	s.Watch = append(s.Watch, Process{Name: "client", PID: os.Getpid()})
	if s.Kind == Idle {
		return r.idle(s.Watch)
	}
	work := map[string]func(*worker, int) error{Up: r.up, Down: r.down, Ask: r.ask, Connect: r.connect, Rate: r.rate}[s.Kind]
	if s.Kind == Rate {
		// Each connection has a thread that sleeps and waits in the kernel; none
		// waits for another's processor.
		runtime.GOMAXPROCS(s.Conns + 2)
	}
	var live sync.WaitGroup
	for i := range r.workers {
		live.Go(func() { r.keep(&r.workers[i], i, work) })
	}
	stop := context.AfterFunc(ctx, r.end)
	defer stop()
	out, err := r.measure(s.Watch)
	r.end()
	live.Wait()
	if err != nil {
		return Result{}, err
	}
	r.collect(&out)
	return out, nil
}

// keep does a worker's work until the end; what fails is counted and tried again.
func (r *run) keep(w *worker, i int, work func(*worker, int) error) {
	for !r.ended.Load() {
		if err := work(w, i); err != nil && !r.ended.Load() {
			r.fault(err)
			select {
			case <-time.After(10 * time.Millisecond):
			case <-r.ctx.Done():
			}
		}
	}
}

func (r *run) fault(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.first == "" {
		r.first = err.Error()
	}
	r.errors++
}

func (r *run) faults() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.errors
}

// measure waits for the warm-up to end and looks at everything twice.
func (r *run) measure(watch []Process) (Result, error) {
	if err := r.wait(r.Warm); err != nil {
		return Result{}, err
	}
	r.measuring.Store(true)
	before, err := look(watch)
	if err != nil {
		return Result{}, err
	}
	ops, bytes := r.counts()
	if err := r.wait(r.For); err != nil {
		return Result{}, err
	}
	after, err := look(watch)
	if err != nil {
		return Result{}, err
	}
	opsNow, bytesNow := r.counts()
	r.measuring.Store(false)
	out := between(before, after)
	out.Ops, out.Bytes = opsNow-ops, bytesNow-bytes
	return out, nil
}

func (r *run) wait(d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

func (r *run) counts() (ops, bytes uint64) {
	for i := range r.workers {
		ops += r.workers[i].ops.Load()
		bytes += r.workers[i].bytes.Load()
	}
	return ops, bytes
}

// collect adds what only stands when all workers have ended.
func (r *run) collect(out *Result) {
	out.Errors, out.Error = r.errors, r.first
	var all Histogram
	for i := range r.workers {
		all.Merge(&r.workers[i].hist)
	}
	if all.Count() > 0 {
		out.Latency = &all
	}
}

// end makes every worker return.
func (r *run) end() {
	r.ended.Store(true)
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		_ = c.SetDeadline(time.Unix(1, 0)) // wakes its worker, which closes it
	}
}

// dial connects and sends the header.
func (r *run) dial(first []byte) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: r.Timeout}
	d.SetMultipathTCP(false)
	c, err := d.DialContext(r.ctx, "tcp", r.Server)
	if err != nil {
		return nil, err
	}
	tc := c.(*net.TCPConn) // the network is tcp
	r.mu.Lock()
	r.conns[c] = true
	ended := r.ended.Load()
	r.mu.Unlock()
	if ended {
		r.close(tc)
		return nil, errors.New("the load has ended")
	}
	if _, err := tc.Write(first); err != nil {
		r.close(tc)
		return nil, err
	}
	return tc, nil
}

func (r *run) close(c *net.TCPConn) {
	r.mu.Lock()
	delete(r.conns, c)
	r.mu.Unlock()
	_ = c.Close() // everything was read or is given up
}

// up writes. What is counted has been written, not yet received: with the pipe
// full at both ends of the window the difference is what arrived.
func (r *run) up(w *worker, _ int) error {
	c, err := r.dial(open(verbSink, headerSize))
	if err != nil {
		return err
	}
	defer r.close(c)
	b := make([]byte, r.Size)
	for {
		n, err := c.Write(b)
		w.bytes.Add(uint64(n))
		if err != nil {
			return err
		}
	}
}

func (r *run) down(w *worker, _ int) error {
	header := open(verbSource, headerSize)
	binary.BigEndian.PutUint32(header[1:], uint32(r.Size))
	c, err := r.dial(header)
	if err != nil {
		return err
	}
	defer r.close(c)
	b := make([]byte, readSize)
	for {
		n, err := c.Read(b)
		w.bytes.Add(uint64(n))
		if err != nil {
			return err
		}
	}
}

// ask sends a request and waits for its response, in turn.
func (r *run) ask(w *worker, _ int) error {
	b := open(verbAnswer, r.Size)
	began := time.Now()
	c, err := r.dial(b)
	if err != nil {
		return err
	}
	defer r.close(c)
	for dialled := true; ; dialled = false {
		if !dialled {
			began = time.Now()
			if _, err := c.Write(b); err != nil {
				return err
			}
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return err
		}
		r.done(w, time.Since(began), !dialled)
	}
}

// done counts a request; its time only where it is one of the kind that is measured.
func (r *run) done(w *worker, took time.Duration, timed bool) {
	w.ops.Add(1)
	w.bytes.Add(uint64(r.Size))
	if timed && r.measuring.Load() {
		w.hist.Add(int64(took))
	}
}

// connect makes a connection for each request.
func (r *run) connect(w *worker, _ int) error {
	first, b := open(verbAnswer, r.Size), make([]byte, r.Size)
	for !r.ended.Load() {
		began := time.Now()
		c, err := r.dial(first)
		if err != nil {
			return err
		}
		_, err = io.ReadFull(c, b)
		r.close(c)
		if err != nil {
			return err
		}
		r.done(w, time.Since(began), true)
	}
	return nil
}
