// Package inspect asks the processes of a lab what only their own host may ask:
// the memory that Go uses, and profiles. A process of ambit-perf's inside the lab
// does it (Serve) for the one outside (Client):
//
//	Client ── a line per question ──▶ Serve ── in the process's network ──▶ its admin port
//	       ◀── a line per answer ───
//
// A Client is for any number of goroutines.
package inspect

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// question asks for a page of a process.
type question struct {
	ID  int    `json:"id"`
	PID int    `json:"pid"`
	URL string `json:"url"`
}

// answer is the page.
type answer struct {
	ID    int    `json:"id"`
	Body  []byte `json:"body,omitempty"`
	Error string `json:"error,omitempty"`
}

// maxPage is more than any profile of a few seconds.
const maxPage = 256 << 20

// Serve answers questions until they end; it first says that it is there.
func Serve(ctx context.Context, in io.Reader, out io.Writer) error {
	if _, err := io.WriteString(out, "{}\n"); err != nil {
		return err
	}
	var mu sync.Mutex // one answer at a time
	enc := json.NewEncoder(out)
	var live sync.WaitGroup
	defer live.Wait()
	for dec := json.NewDecoder(in); ; {
		var q question
		if err := dec.Decode(&q); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read question: %w", err)
		}
		live.Go(func() {
			a := answer{ID: q.ID}
			var err error
			if a.Body, err = fetch(ctx, q.PID, q.URL); err != nil {
				a.Error = err.Error()
			}
			mu.Lock()
			defer mu.Unlock()
			_ = enc.Encode(a) // who asked has gone: so has the lab
		})
	}
}

// fetch reads a page from where a process is.
func fetch(ctx context.Context, pid int, url string) ([]byte, error) {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return dialIn(ctx, pid, network, addr)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxPage))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, resp.Status, strings.TrimSpace(string(b)))
	}
	return b, err
}

// dialIn connects in the network namespace of a process. The thread that went
// there ends with its goroutine.
func dialIn(ctx context.Context, pid int, network, addr string) (net.Conn, error) {
	type dialled struct {
		conn net.Conn
		err  error
	}
	donec := make(chan dialled, 1)
	go func() {
		runtime.LockOSThread() // and never unlock
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err != nil {
			donec <- dialled{nil, err}
			return
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			donec <- dialled{nil, fmt.Errorf("enter network of process %d: %w", pid, err)}
			return
		}
		var d net.Dialer // an address, not a name: it dials on this thread
		c, err := d.DialContext(ctx, network, addr)
		donec <- dialled{c, err}
	}()
	d := <-donec
	return d.conn, d.err
}

// Client asks.
type Client struct {
	writing sync.Mutex // a question at a time; taken before mu, which answers need
	to      io.Writer  // guarded by writing

	mu      sync.Mutex
	waiting map[int]chan answer // guarded by mu
	last    int                 // guarded by mu
	ended   error               // guarded by mu
}

// NewClient asks over to and takes answers from r, until r ends. What r begins with
// has been read.
func NewClient(to io.Writer, r *bufio.Reader) *Client {
	c := &Client{to: to, waiting: map[int]chan answer{}}
	go c.readLoop(r) // ends with the process at the other end
	return c
}

func (c *Client) readLoop(r io.Reader) {
	for dec := json.NewDecoder(r); ; {
		var a answer
		err := dec.Decode(&a)
		c.mu.Lock()
		if err != nil {
			c.ended = fmt.Errorf("the lab answers no more: %w", err)
			for id, ch := range c.waiting {
				ch <- answer{ID: id, Error: c.ended.Error()} // has room for one
				delete(c.waiting, id)
			}
			c.mu.Unlock()
			return
		}
		if ch, ok := c.waiting[a.ID]; ok {
			ch <- a // has room for one
			delete(c.waiting, a.ID)
		}
		c.mu.Unlock()
	}
}

// Get reads a page of a process's.
func (c *Client) Get(ctx context.Context, pid int, url string) ([]byte, error) {
	ch, err := c.ask(pid, url)
	if err != nil {
		return nil, err
	}
	select {
	case a := <-ch:
		if a.Error != "" {
			return nil, fmt.Errorf("ask process %d: %s", pid, a.Error)
		}
		return a.Body, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (c *Client) ask(pid int, url string) (<-chan answer, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	ch := make(chan answer, 1)
	id, err := c.expect(ch)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(question{id, pid, url})
	if err == nil {
		_, err = c.to.Write(append(b, '\n'))
	}
	if err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.waiting, id)
		return nil, fmt.Errorf("ask process %d: %w", pid, err)
	}
	return ch, nil
}

// expect numbers a question whose answer goes to ch.
func (c *Client) expect(ch chan answer) (id int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended != nil {
		return 0, c.ended
	}
	c.last++
	c.waiting[c.last] = ch
	return c.last, nil
}

// Heap is the Go heap in use of a process, by its metrics; ok is false where it
// has none, because it is no program of Go's.
func (c *Client) Heap(ctx context.Context, pid int, metrics string) (bytes uint64, ok bool) {
	b, err := c.Get(ctx, pid, metrics)
	if err != nil {
		return 0, false
	}
	_, after, ok := strings.Cut(string(b), "\ngo_memstats_heap_inuse_bytes ")
	if !ok {
		return 0, false
	}
	line, _, _ := strings.Cut(after, "\n")
	v, err := strconv.ParseFloat(line, 64) // 1.2345e+07
	return uint64(v), err == nil && v >= 0
}
