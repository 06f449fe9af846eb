package interop

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Verb is the test binary's first argument when it moves bytes in a pod.
const Verb = "traffic"

// Main is the program in the pods: `traffic serve`, `traffic CASE HOST`, or a
// relay, `traffic forward|gateway LISTEN TARGET`. It
// returns the exit code; what was seen is on standard output.
func Main(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	fs := flag.NewFlagSet(Verb, flag.ContinueOnError)
	n := fs.Int64("n", 1, "how many, or how much")
	d := fs.Duration("d", 5*time.Second, "how long")
	if len(args) == 0 || fs.Parse(args[1:]) != nil {
		return 2
	}
	if args[0] == "serve" {
		return told("", serve(ctx))
	}
	if (args[0] == "forward" || args[0] == "gateway") && fs.NArg() == 2 {
		return told("", forward(ctx, fs.Arg(0), fs.Arg(1), args[0] == "gateway"))
	}
	if args[0] == "probe" {
		return told(probe(fs.Args(), *d))
	}
	c, ok := calls[args[0]]
	if !ok || fs.NArg() != 1 {
		fmt.Fprintf(os.Stderr, "no case %q for %d hosts\n", args[0], fs.NArg())
		return 2
	}
	return told(c(ctx, target{fs.Arg(0), *n, *d}))
}

func told(out string, err error) int {
	if out != "" {
		fmt.Println(out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// target is where a case goes and how much it does.
type target struct {
	host string
	n    int64
	d    time.Duration
}

var calls = map[string]func(context.Context, target) (string, error){
	"echo": callEcho, "sink": callSink, "bye": callBye, "duplex": callDuplex, "greet": callGreet, "abort": callAbort,
	"reset": callReset, "nobody": callNobody, "who": callWho, "many": callMany, "hold": callHold, "load": callLoad,
	"switch": callSwitch, "line": callLine, "rr": callRR, "connects": callConnects, "bulk": callBulk,
}

const patience = 15 * time.Second

func dial(host string, port uint16) (*net.TCPConn, error) {
	c, err := net.DialTimeout("tcp", net.JoinHostPort(host, strconv.Itoa(int(port))), patience)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// short is dial for what has to be over soon.
func short(host string, port uint16) (*net.TCPConn, error) {
	c, err := dial(host, port)
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(patience))
}

// ping sends a block and wants it back.
func ping(c net.Conn, block []byte) error {
	if _, err := c.Write(block); err != nil {
		return err
	}
	got := make([]byte, len(block))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(block, got) {
		return errors.New("other bytes came back")
	}
	return nil
}

func callEcho(_ context.Context, t target) (string, error) {
	for i := range t.n {
		c, err := short(t.host, portEcho)
		if err != nil {
			return "", err
		}
		err = ping(c, fmt.Appendf(nil, "call %d", i))
		_ = c.Close() // the answer is here
		if err != nil {
			return "", fmt.Errorf("call %d: %w", i, err)
		}
	}
	return "", nil
}

func callSink(_ context.Context, t target) (string, error) {
	c, err := short(t.host, portSink)
	if err != nil {
		return "", err
	}
	defer c.Close()
	h := sha256.New()
	if _, err := io.Copy(c, io.TeeReader(io.LimitReader(bytesOf(7), t.n), h)); err != nil {
		return "", err
	}
	if err := c.CloseWrite(); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(c)
	if err != nil {
		return "", err
	}
	if want := fmt.Sprintf("%d %s\n", t.n, hex.EncodeToString(h.Sum(nil))); string(answer) != want {
		return "", fmt.Errorf("after the half-close came %q, want %q", answer, want)
	}
	return "", nil
}

// tell asks the server how the connection with this token ended.
func tell(host, token string) (string, error) {
	c, err := short(host, portAsk)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := fmt.Fprintln(c, token); err != nil {
		return "", err
	}
	s, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(s), err
}

func callBye(_ context.Context, t target) (string, error) {
	c, err := short(t.host, portBye)
	if err != nil {
		return "", err
	}
	defer c.Close()
	said, err := io.ReadAll(c)
	if err != nil || string(said) != "bye\n" {
		return "", fmt.Errorf("the server said %q: %w", said, err)
	}
	token := fmt.Sprint("bye-", time.Now().UnixNano())
	if _, err := fmt.Fprintf(c, "%s\n%s", token, strings.Repeat("x", int(t.n))); err != nil {
		return "", fmt.Errorf("send after the server's half-close: %w", err)
	}
	if err := c.Close(); err != nil {
		return "", err
	}
	how, err := tell(t.host, token)
	if want := fmt.Sprintf("%d eof", t.n); err == nil && how != want {
		err = fmt.Errorf("the server saw %q after its half-close, want %q", how, want)
	}
	return "", err
}

func callDuplex(_ context.Context, t target) (string, error) {
	c, err := dial(t.host, portDuplex)
	if err != nil {
		return "", err
	}
	defer c.Close()
	const seed = 42
	var head [16]byte
	binary.BigEndian.PutUint64(head[:], seed)
	binary.BigEndian.PutUint64(head[8:], uint64(t.n))
	if _, err := c.Write(head[:]); err != nil {
		return "", err
	}
	began := time.Now()
	sent, got, err := exchange(struct{ net.Conn }{c}, seed, t.n)
	if err != nil {
		return "", err
	}
	theirs := make([]byte, sha256.Size)
	if _, err := io.ReadFull(c, theirs); err != nil {
		return "", err
	}
	want := sha256.New()
	if _, err := io.CopyN(want, bytesOf(seed+1), t.n); err != nil {
		return "", err
	}
	if !bytes.Equal(theirs, sent.Sum(nil)) || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		return "", errors.New("the hash of what came is not the hash of what went")
	}
	return fmt.Sprintf("%.1f MB/s each way", float64(t.n)/1e6/time.Since(began).Seconds()), nil
}

func callGreet(_ context.Context, t target) (string, error) {
	c, err := short(t.host, portGreet)
	if err != nil {
		return "", err
	}
	defer c.Close()
	r := bufio.NewReader(c)
	if _, err := r.ReadString('\n'); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, "thanks\n"); err != nil {
		return "", err
	}
	said, err := r.ReadString('\n')
	if err == nil && said != "got thanks\n" {
		err = fmt.Errorf("the server said %q", said)
	}
	return "", err
}

// callAbort says how a server's RST looks to the client.
func callAbort(_ context.Context, t target) (string, error) {
	c, err := short(t.host, portAbort)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := io.WriteString(c, "go\n"); err != nil {
		return "", err
	}
	_, err = io.Copy(io.Discard, c)
	how := ending(err)
	if how != "eof" && how != "reset" {
		return how, fmt.Errorf("a server that resets is seen as %q", how)
	}
	return how, nil
}

// callReset says how a client's RST looks to the server.
func callReset(_ context.Context, t target) (string, error) {
	c, err := short(t.host, portObserve)
	if err != nil {
		return "", err
	}
	defer c.Close()
	token := fmt.Sprint("reset-", time.Now().UnixNano())
	if _, err := fmt.Fprintln(c, token); err != nil {
		return "", err
	}
	if _, err := bufio.NewReader(c).ReadString('\n'); err != nil {
		return "", err
	}
	if err := errors.Join(c.SetLinger(0), c.Close()); err != nil {
		return "", err
	}
	how, err := tell(t.host, token)
	if err == nil && how != "eof" && how != "reset" {
		err = fmt.Errorf("a client that resets is seen as %q", how)
	}
	return how, err
}

// callNobody goes to a port on which nothing listens.
func callNobody(_ context.Context, t target) (string, error) {
	v := try(net.JoinHostPort(t.host, strconv.Itoa(portNobody)), 8*time.Second)
	if v == "ok" || v == "timeout" {
		return v, fmt.Errorf("a port without listener: %s", v)
	}
	return v, nil
}

func callWho(_ context.Context, t target) (string, error) {
	seen := map[string]int{}
	for range t.n {
		c, err := short(t.host, portWho)
		if err != nil {
			return "", err
		}
		b, err := io.ReadAll(c)
		_ = c.Close() // read to its end
		if err != nil {
			return "", err
		}
		if len(b) == 0 {
			return "", errors.New("closed without an answer")
		}
		seen[strings.TrimSpace(string(b))]++
	}
	out, err := json.Marshal(seen)
	return string(out), err
}

// callMany holds n connections at once; each answers twice while all are open.
func callMany(_ context.Context, t target) (string, error) {
	var opened, done sync.WaitGroup
	errc := make(chan error, t.n)
	opened.Add(int(t.n))
	for i := range t.n {
		done.Go(func() {
			once := sync.OnceFunc(opened.Done)
			defer once()
			errc <- func() error {
				c, err := dial(t.host, portEcho)
				if err != nil {
					return err
				}
				defer c.Close()
				if err := c.SetDeadline(time.Now().Add(40 * time.Second)); err != nil {
					return err
				}
				block := []byte(strings.Repeat(fmt.Sprintf("%08d", i), 128))
				if err := ping(c, block); err != nil {
					return fmt.Errorf("connection %d: %w", i, err)
				}
				once()
				opened.Wait()
				if err := ping(c, block); err != nil {
					return fmt.Errorf("connection %d with all open: %w", i, err)
				}
				return nil
			}()
		})
	}
	done.Wait()
	close(errc)
	var first error
	failed := 0
	for err := range errc {
		if err != nil {
			failed++
			first = cmpErr(first, err)
		}
	}
	if failed > 0 {
		return "", fmt.Errorf("%d of %d failed: %w", failed, t.n, first)
	}
	return "", nil
}

func cmpErr(first, err error) error {
	if first != nil {
		return first
	}
	return err
}

// callHold keeps a connection that answers ten times a second until it breaks or
// a signal comes; the time it lived and its end are printed.
func callHold(ctx context.Context, t target) (string, error) {
	c, err := dial(t.host, portEcho)
	if err != nil {
		return "", err
	}
	defer c.Close()
	began := time.Now()
	for i := 0; ; i++ {
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return "", err
		}
		if err := ping(c, fmt.Appendf(nil, "%08d", i)); err != nil {
			return fmt.Sprintf("%s after %s", ending(err), time.Since(began).Round(time.Millisecond)), errors.New("broken")
		}
		if i == 0 {
			fmt.Println("open")
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Sprintf("held %s", time.Since(began).Round(time.Millisecond)), nil
		}
	}
}

// Load is what callLoad counts.
type Load struct {
	Calls, Failed int            // connections of one question each
	Asked, Broken int            // questions on, and ends of, connections that stay
	Errors        map[string]int `json:",omitempty"`
	LongestMS     int64          // between two good answers of any kind
}

// callLoad keeps t.n connections asking and makes others one after the other,
// until a signal comes.
func callLoad(ctx context.Context, t target) (string, error) {
	var (
		mu   sync.Mutex
		l    = Load{Errors: map[string]int{}}
		last = time.Now()
		all  sync.WaitGroup
	)
	note := func(n, bad *int, err error) {
		mu.Lock()
		defer mu.Unlock()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			*bad++
			l.Errors[ending(err)]++
			return
		}
		*n++
		l.LongestMS = max(l.LongestMS, time.Since(last).Milliseconds())
		last = time.Now()
	}
	pause := func(d time.Duration) {
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
	}
	all.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			c, err := dial(t.host, portEcho)
			if err == nil {
				err = errors.Join(c.SetDeadline(time.Now().Add(patience)), ping(c, fmt.Appendf(nil, "%08d", i)), c.Close())
			}
			note(&l.Calls, &l.Failed, err)
			pause(10 * time.Millisecond)
		}
	})
	for range t.n {
		all.Go(func() {
			for ctx.Err() == nil {
				c, err := dial(t.host, portEcho)
				for i := 0; err == nil && ctx.Err() == nil; i++ {
					err = errors.Join(c.SetDeadline(time.Now().Add(patience)), ping(c, fmt.Appendf(nil, "%08d", i)))
					note(&l.Asked, &l.Broken, err)
					pause(20 * time.Millisecond)
				}
				if c != nil {
					_ = c.Close() // the next one follows
				}
				pause(50 * time.Millisecond)
			}
		})
	}
	fmt.Println("running")
	all.Wait()
	out, err := json.Marshal(l)
	return string(out), err
}

// callLine prints the first line that comes from host:port, a whole address.
func callLine(_ context.Context, t target) (string, error) {
	c, err := net.DialTimeout("tcp", t.host, patience)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(line), err
}

func callSwitch(_ context.Context, t target) (string, error) {
	c, err := short(t.host, portSwitch)
	if err != nil {
		return "", err
	}
	defer c.Close()
	word := "unready"
	if t.n > 0 {
		word = "ready"
	}
	if _, err := fmt.Fprintln(c, word); err != nil {
		return "", err
	}
	_, err = bufio.NewReader(c).ReadString('\n')
	return "", err
}

// try asks an echo port: "ok", or how it failed.
func try(addr string, limit time.Duration) string {
	c, err := net.DialTimeout("tcp", addr, limit)
	if err != nil {
		if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
			return "timeout"
		}
		return ending(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
		return err.Error()
	}
	if err := ping(c, []byte("let me in")); err != nil {
		return ending(err)
	}
	return "ok"
}

// probe tries all addresses at once and prints address → outcome.
func probe(addrs []string, limit time.Duration) (string, error) {
	got := make([]string, len(addrs))
	var all sync.WaitGroup
	for i, a := range addrs {
		all.Go(func() { got[i] = try(a, limit) })
	}
	all.Wait()
	m := map[string]string{}
	for i, a := range addrs {
		m[a] = got[i]
	}
	out, err := json.Marshal(m)
	return string(out), err
}

// callRR measures questions of 1 KiB over t.n connections: rate, median and p99.
func callRR(_ context.Context, t target) (string, error) {
	return measure(t, func(end time.Time, took func(time.Duration)) error {
		c, err := dial(t.host, portEcho)
		if err != nil {
			return err
		}
		defer c.Close()
		block := bytes.Repeat([]byte("k"), 1<<10)
		for now := time.Now(); now.Before(end); {
			if err := ping(c, block); err != nil {
				return err
			}
			next := time.Now()
			took(next.Sub(now))
			now = next
		}
		return nil
	})
}

// callConnects measures connections of one small question each, t.n at a time.
func callConnects(_ context.Context, t target) (string, error) {
	return measure(t, func(end time.Time, took func(time.Duration)) error {
		for now := time.Now(); now.Before(end); {
			c, err := dial(t.host, portEcho)
			if err != nil {
				return err
			}
			err = ping(c, []byte("x"))
			_ = c.Close() // the answer is here
			if err != nil {
				return err
			}
			next := time.Now()
			took(next.Sub(now))
			now = next
		}
		return nil
	})
}

func measure(t target, work func(end time.Time, took func(time.Duration)) error) (string, error) {
	var (
		mu    sync.Mutex
		times []time.Duration
		all   sync.WaitGroup
		errc  = make(chan error, t.n)
		began = time.Now()
	)
	for range t.n {
		all.Go(func() {
			var own []time.Duration
			errc <- work(began.Add(t.d), func(d time.Duration) { own = append(own, d) })
			mu.Lock()
			defer mu.Unlock()
			times = append(times, own...)
		})
	}
	all.Wait()
	close(errc)
	for err := range errc {
		if err != nil {
			return "", err
		}
	}
	slices.Sort(times)
	out, err := json.Marshal(Figure{
		Rate: float64(len(times)) / time.Since(began).Seconds(),
		P50:  times[len(times)/2].Seconds() * 1e6, P99: times[len(times)*99/100].Seconds() * 1e6,
	})
	return string(out), err
}

// Figure is a measured rate per second and times in microseconds.
type Figure struct{ Rate, P50, P99 float64 }

// callBulk measures one connection that sends for t.d.
func callBulk(_ context.Context, t target) (string, error) {
	c, err := dial(t.host, portDrop)
	if err != nil {
		return "", err
	}
	defer c.Close()
	block := make([]byte, 128<<10)
	began, sent := time.Now(), int64(0)
	for time.Since(began) < t.d {
		n, err := c.Write(block)
		if err != nil {
			return "", err
		}
		sent += int64(n)
	}
	if err := c.CloseWrite(); err != nil {
		return "", err
	}
	if _, err := io.ReadAll(c); err != nil { // the server's answer comes when all is there
		return "", err
	}
	out, err := json.Marshal(Figure{Rate: float64(sent) / time.Since(began).Seconds()})
	return string(out), err
}
