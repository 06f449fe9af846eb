package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// loadReport is what a closed loop of requests saw. Times are in microseconds.
type loadReport struct {
	Requests int     `json:"requests"`
	Errors   int     `json:"errors"`
	Rate     float64 `json:"rate"` // per second
	P50      float64 `json:"p50us"`
	P99      float64 `json:"p99us"`
	Max      float64 `json:"maxus"`
	Error    string  `json:"error,omitempty"` // the first one
}

// load sends requests to a TCP echo server, each connection the next one when
// it has the answer to the last, and reports rate and latency.
func load(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("load", flag.ContinueOnError)
	conns := fs.Int("conns", 8, "connections at a time")
	size := fs.Int("size", 1024, "bytes per request")
	fresh := fs.Bool("fresh", false, "a connection for each request")
	secure := fs.Bool("tls", false, "a TLS handshake in place of each request, on a connection of its own")
	for_ := fs.Duration("for", 5*time.Second, "how long")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() != 1 || *conns < 1 || *size < 1 {
		return errors.New("load wants HOST:PORT of a TCP echo server, and at least one connection and byte")
	}
	exchange := func() func(net.Conn) error { return echoed(*size) }
	if *secure {
		*fresh = true
		exchange = func() func(net.Conn) error { return handshake }
	}
	until := time.Now().Add(*for_)
	var (
		mu     sync.Mutex
		times  []time.Duration
		report loadReport
		wg     sync.WaitGroup
	)
	began := time.Now()
	for range *conns {
		wg.Go(func() {
			seen, errs, first := closedLoop(ctx, until, fs.Arg(0), exchange(), *fresh)
			mu.Lock()
			defer mu.Unlock()
			times, report.Errors = append(times, seen...), report.Errors+errs
			if first != nil && report.Error == "" {
				report.Error = first.Error()
			}
		})
	}
	wg.Wait()
	took := time.Since(began).Seconds()
	slices.Sort(times)
	report.Requests, report.Rate = len(times), float64(len(times))/took
	if n := len(times); n > 0 {
		at := func(q float64) float64 { return float64(times[min(n-1, int(q*float64(n)))].Nanoseconds()) / 1e3 }
		report.P50, report.P99, report.Max = at(0.5), at(0.99), at(1)
	}
	return json.NewEncoder(out).Encode(report)
}

// echoed sends as much and waits until it is back; for one goroutine.
func echoed(size int) func(net.Conn) error {
	buf, answer := make([]byte, size), make([]byte, size)
	return func(c net.Conn) error {
		if _, err := c.Write(buf); err != nil {
			return err
		}
		_, err := io.ReadFull(c, answer)
		return err
	}
}

// handshake completes TLS as far as a client without a certificate sees it.
func handshake(c net.Conn) error {
	return tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}).Handshake()
}

func closedLoop(ctx context.Context, until time.Time, addr string, exchange func(net.Conn) error, fresh bool) (times []time.Duration, errs int, first error) {
	var c net.Conn
	once := func() (err error) {
		if c == nil {
			if c, err = (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", addr); err != nil {
				return err
			}
			_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		}
		if err = exchange(c); err != nil || fresh {
			_ = c.Close() // the exchange's own error says more
			c = nil
		} else {
			_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		}
		return err
	}
	for ctx.Err() == nil && time.Now().Before(until) {
		began := time.Now()
		if err := once(); err != nil {
			if ctx.Err() != nil {
				break
			}
			if errs++; first == nil {
				first = err
			}
			continue
		}
		times = append(times, time.Since(began))
	}
	if c != nil {
		_ = c.Close()
	}
	return times, errs, first
}

// attack misuses a mesh: it is the neighbour that others must not notice.
func attack(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("attack", flag.ContinueOnError)
	n := fs.Int("n", 1000, "connections at a time")
	if err := fs.Parse(args); err != nil {
		return err
	}
	kinds := map[string]func(context.Context, net.Conn){
		"handshakes": trickle, // a TLS handshake that never ends
		"stalled":    stall,   // answers that are never read
		"connects":   func(context.Context, net.Conn) {},
	}
	if fs.NArg() != 2 || kinds[fs.Arg(0)] == nil || *n < 1 {
		return errors.New("attack wants handshakes|stalled|connects and HOST:PORT")
	}
	var (
		mu           sync.Mutex
		opened, lost int
		wg           sync.WaitGroup
	)
	for range *n {
		wg.Go(func() {
			for ctx.Err() == nil {
				c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", fs.Arg(1))
				mu.Lock()
				if err != nil {
					lost++
				} else {
					opened++
				}
				mu.Unlock()
				if err != nil {
					select { // who is refused does not spin
					case <-ctx.Done():
					case <-time.After(50 * time.Millisecond):
					}
					continue
				}
				kinds[fs.Arg(0)](ctx, c)
				_ = c.Close() // nothing was promised
			}
		})
	}
	wg.Wait()
	return json.NewEncoder(out).Encode(map[string]int{"opened": opened, "refused": lost})
}

// trickle sends the start of a ClientHello, a byte per second.
func trickle(ctx context.Context, c net.Conn) {
	hello := []byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}
	for i := 0; ctx.Err() == nil; i++ {
		if _, err := c.Write(hello[min(i, len(hello)-1):][:1]); err != nil {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// stall sends what an echo server sends back, and reads nothing.
func stall(ctx context.Context, c net.Conn) {
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	buf := make([]byte, 64<<10)
	for {
		if _, err := c.Write(buf); err != nil {
			return
		}
	}
}
