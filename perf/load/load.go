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
	"maps"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
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
	Settle  = "settle"    // many connections, one after the other, then a while of nothing

	HTTP       = "http"        // requests of HTTP/1.1 or, with H2, of HTTP/2 in clear text
	GRPC       = "grpc"        // unary calls
	GRPCStream = "grpc-stream" // messages and answers on streams that stay open

	Decide = "decide" // connections at fixed times, and whether they were served

	Handshake = "handshake" // mutual TLS with the far proxy, then close
	Tunnel    = "tunnel"    // a tunnel to the far proxy of its own for each request

	Enrol = "enrol" // nothing, while pods are taken into the mesh
	Learn = "learn" // nothing, while workloads become known
)

// kinds are all of them; what they need, and how they are shown.
var kinds = map[string]struct {
	work  func(*run, *worker, int) error // nil: not done by workers
	paced bool                           // PerSec is allowed
}{
	Up: {work: (*run).up}, Down: {work: (*run).down}, Ask: {work: (*run).ask}, Connect: {(*run).connect, true}, Rate: {(*run).rate, true},
	Idle: {}, Settle: {}, Enrol: {}, Learn: {}, HTTP: {(*run).http, true}, GRPC: {(*run).grpcUnary, true}, GRPCStream: {(*run).grpcStream, true},
	Decide: {(*run).decide, true}, Handshake: {work: (*run).handshake}, Tunnel: {work: (*run).tunnel},
}

// Known says whether there is such a kind.
func Known(kind string) bool {
	_, ok := kinds[kind]
	return ok
}

// Spec is one load.
type Spec struct {
	Kind    string        `json:"kind"`
	Server  string        `json:"server"`
	Conns   int           `json:"conns"`
	Size    int           `json:"size,omitempty"`   // bytes of a write, or of a request and of its response
	PerSec  int           `json:"perSec,omitempty"` // requests at fixed times in place of as many as can be had
	Pace    int           `json:"pace,omitempty"`   // bytes per second of each connection of Up; 0: as many as can be had
	Calls   int           `json:"calls,omitempty"`  // at a time on each connection of gRPC; 0: one
	Total   int           `json:"total,omitempty"`  // connections of Settle, pods of Enrol, workloads of Learn
	H2      bool          `json:"h2,omitempty"`
	Group   string        `json:"group,omitempty"`  // key exchange of handshakes: "", what Go prefers, or "x25519"
	Beside  string        `json:"beside,omitempty"` // what goes on meanwhile, for people; a baseline without it was measured before
	Client  *Client       `json:"client,omitempty"` // who makes handshakes
	Warm    time.Duration `json:"warm"`
	For     time.Duration `json:"for"`
	Watch   []Process     `json:"watch,omitempty"` // processes to measure
	Timeout time.Duration `json:"timeout"`         // of a dial
	Label   string        `json:"-"`               // names this run among others

	Pinned   bool `json:"pinned,omitempty"`   // client and server on CPUs of their own
	Syscalls bool `json:"syscalls,omitempty"` // count them, which costs some of what is measured
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
	Later   time.Duration `json:"later,omitempty"` // of it, the part that Usage.Later is about

	Agreed   string             `json:"agreed,omitempty"`   // cipher suite and key exchange of the client's own handshakes
	Baseline *Baseline          `json:"baseline,omitempty"` // the same load before what went on beside it began
	Figures  map[string]float64 `json:"figures,omitempty"`  // what a scenario has besides, by its name and unit
	Decided  []Decision         `json:"decided,omitempty"`  // of Decide: the first, and each that differs from the one before
	Ended    time.Time          `json:"ended,omitzero"`     // of Decide: no decision was looked for later
}

// Baseline is the undisturbed part of a measurement.
type Baseline struct {
	Elapsed time.Duration `json:"elapsed"`
	Ops     uint64        `json:"ops"`
	Errors  uint64        `json:"errors"`
	Latency *Histogram    `json:"latency,omitempty"`
	Steal   time.Duration `json:"steal,omitempty"`
}

// Validate says what is wrong with a spec.
func (s Spec) Validate() error {
	kind, known := kinds[s.Kind]
	switch {
	case !known:
		return fmt.Errorf("kind %q: want one of %s", s.Kind, strings.Join(slices.Sorted(maps.Keys(kinds)), ", "))
	case s.Conns < 1:
		return fmt.Errorf("conns %d: want at least one", s.Conns)
	case s.Size < headerSize || s.Size > maxSize:
		return fmt.Errorf("size %d: want %d to %d", s.Size, headerSize, maxSize)
	case s.For <= 0:
		return fmt.Errorf("for %s: want a positive time", s.For)
	case s.Pace != 0 && (s.Kind != Up || s.Pace < s.Size):
		return fmt.Errorf("pace %d: only %s has one, of at least a write per second", s.Pace, Up)
	case s.Calls < 0 || s.Calls > 1 && s.Kind != GRPC && s.Kind != GRPCStream:
		return fmt.Errorf("calls %d: only gRPC has several on a connection", s.Calls)
	case s.PerSec != 0 && !kind.paced:
		return fmt.Errorf("perSec %d: %s has no fixed rate", s.PerSec, s.Kind)
	case (s.Kind == Rate || s.Kind == Decide || s.PerSec != 0) && s.PerSec < s.workers():
		return fmt.Errorf("perSec %d: want at least one request per connection and second", s.PerSec)
	case s.Kind == Settle && s.Total < s.Conns:
		return fmt.Errorf("total %d: want at least one connection of each", s.Total)
	case (s.Kind == Enrol || s.Kind == Learn) && s.Total < 1:
		return fmt.Errorf("total %d: want what comes meanwhile", s.Total)
	case (s.Kind == Handshake || s.Kind == Tunnel) && s.Client == nil:
		return fmt.Errorf("kind %s: want a client certificate", s.Kind)
	case s.Group != "" && s.Group != X25519:
		return fmt.Errorf("group %q: want none or %s", s.Group, X25519)
	}
	return nil
}

// workers is how many requests are under way at most.
func (s Spec) workers() int { return s.Conns * max(s.Calls, 1) }

// The header with which a client opens each connection: what it wants, and the
// size of its writes or requests.
const (
	headerSize = 5
	maxSize    = 16 << 20

	verbSink   = 'u' // take everything
	verbSource = 'd' // send blocks of that size
	verbAnswer = 'r' // answer requests of that size with as much; the header is part of the first
	verbGRPC   = 'g' // what follows is gRPC
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
	due        time.Duration // of the next request at a fixed rate, on the monotonic clock
	open       time.Duration // of the first that has no answer in the histogram
	_          [64]byte      // the next worker's counters are on another cache line
}

// run is a load in progress.
type run struct {
	Spec
	ctx       context.Context
	measuring atomic.Bool
	window    [2]time.Duration // its beginning and end, on the monotonic clock
	ended     atomic.Bool
	workers   []worker
	calls     *calls // of gRPC
	decided   decisions

	mu     sync.Mutex
	conns  map[net.Conn]bool // open ones; guarded by mu
	errors uint64            // guarded by mu
	first  string            // guarded by mu
	agreed string            // guarded by mu
	last   time.Time         // when it ended; guarded by mu
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
	r := &run{Spec: s, ctx: ctx, workers: make([]worker, s.workers()), conns: map[net.Conn]bool{}}
	s.Watch = append(s.Watch, Process{Name: "client", PID: os.Getpid()})
	if s.Pinned {
		restore, err := pinned(s.Watch)
		if err != nil {
			return Result{}, err
		}
		defer restore()
	}
	if s.Syscalls {
		c, err := countSyscalls(s.Watch)
		if err != nil {
			return Result{}, err
		}
		defer c.close()
		for i := range s.Watch {
			s.Watch[i].counted = c
		}
	}
	switch s.Kind {
	case Idle:
		return r.idle(s.Watch)
	case Settle:
		return r.settle(s.Watch)
	case Enrol, Learn:
		return r.still(s.Watch)
	case GRPC, GRPCStream:
		var err error
		if r.calls, err = dialGRPC(r); err != nil {
			return Result{}, err
		}
		defer r.calls.close()
	case HTTP:
		quietFortio()
	}
	work := kinds[s.Kind].work
	if s.PerSec > 0 {
		// Each worker has a thread that sleeps in the kernel; none waits for
		// another's processor.
		runtime.GOMAXPROCS(len(r.workers) + 2)
		r.schedule()
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
func (r *run) keep(w *worker, i int, work func(*run, *worker, int) error) {
	for !r.ended.Load() {
		if err := work(r, w, i); err != nil && !r.ended.Load() {
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
	r.window[0] = monotonic()
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
	r.window[1] = monotonic()
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
	out.Errors, out.Error, out.Agreed = r.errors, r.first, r.agreed
	if out.Decided = r.decided.changes(); r.Kind == Decide {
		out.Ended = r.last
	}
	var all Histogram
	for i := range r.workers {
		r.overdue(&r.workers[i])
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
	if r.last.IsZero() {
		r.last = time.Now()
	}
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
	if r.Kind == Connect || r.Kind == Decide || r.Kind == Settle || r.Kind == Handshake || r.Kind == Tunnel {
		_ = c.SetDeadline(time.Now().Add(r.Timeout)) // a fresh connection takes it
	}
	r.mu.Lock()
	r.conns[c] = true
	ended := r.ended.Load()
	r.mu.Unlock()
	if ended {
		r.close(tc)
		return nil, errors.New("the load has ended")
	}
	if _, err := tc.Write(first); len(first) > 0 && err != nil {
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
	next := time.Now()
	for {
		n, err := c.Write(b)
		w.bytes.Add(uint64(n))
		if err != nil {
			return err
		}
		if r.Pace > 0 {
			next = next.Add(time.Duration(float64(r.Size) / float64(r.Pace) * float64(time.Second)))
			if d := time.Until(next); d > 0 {
				time.Sleep(d) // a little late is made up for by the next
			}
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
		w.open = w.due
	}
}

// connect makes a connection for each request.
func (r *run) connect(w *worker, _ int) error {
	defer r.pin()()
	first, b := open(verbAnswer, r.Size), make([]byte, r.Size)
	for !r.ended.Load() {
		began, err := r.turn(w)
		if err != nil {
			return err
		}
		c, err := r.dial(first)
		if err != nil {
			return err
		}
		_, err = io.ReadFull(c, b)
		r.close(c)
		if err != nil {
			return err
		}
		r.done(w, monotonic()-began, true)
	}
	return nil
}
