package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"time"
)

// soakReport counts connections by how they ended. Broken is what a client can
// see and try again: refused, reset, timed out. Wrong is what it cannot see: a
// byte changed, lost or added, or an end in order before all was there.
type soakReport struct {
	Complete int    `json:"complete"`
	Broken   int    `json:"broken"`
	Wrong    int    `json:"wrong"`
	Bytes    int64  `json:"bytes"` // compared, each way
	First    string `json:"first,omitempty"`
}

// soak sends random bytes to a TCP echo server and compares every byte that
// comes back, on connections of all sizes, until the time is over. It fails if
// anything was wrong.
func soak(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("soak", flag.ContinueOnError)
	conns := fs.Int("conns", 16, "connections at a time")
	most := fs.Int("max", 4<<20, "bytes of the largest connection")
	marker := fs.String("marker", "", "text at the start of each connection, for a sniffer to look for")
	for_ := fs.Duration("for", 10*time.Second, "how long")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() < 1 || *conns < 1 || *most < 1 {
		return errors.New("soak wants HOST:PORT of TCP echo servers, and at least one connection and byte")
	}
	until, cancel := context.WithTimeout(ctx, *for_)
	defer cancel()
	var (
		mu     sync.Mutex
		report soakReport
		wg     sync.WaitGroup
	)
	for i := range *conns {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(rand.Uint64(), uint64(i)))
			for until.Err() == nil {
				n, err := compare(fs.Arg(r.IntN(fs.NArg())), len(*marker)+size(r, *most), *marker, r.Uint64())
				mu.Lock()
				report.Bytes += n
				if w, ok := errors.AsType[*wrongError](err); ok {
					report.Wrong++
					if report.First == "" {
						report.First = w.Error()
					}
				} else if err != nil {
					report.Broken++
				} else {
					report.Complete++
				}
				mu.Unlock()
				if err != nil {
					select { // who is refused does not spin
					case <-until.Done():
					case <-time.After(20 * time.Millisecond):
					}
				}
			}
		})
	}
	wg.Wait()
	if err := json.NewEncoder(out).Encode(report); err != nil {
		return err
	}
	if report.Wrong > 0 {
		return fmt.Errorf("%d connections were wrong", report.Wrong)
	}
	return nil
}

// size prefers small connections and reaches the largest.
func size(r *rand.Rand, most int) int {
	n := most
	for n > 1 && r.IntN(3) > 0 {
		n /= 4
	}
	return 1 + r.IntN(max(n, 1))
}

type wrongError struct{ what string }

func (e *wrongError) Error() string { return e.what }

// pattern is the marker, then a stream of bytes that only its seed tells.
func pattern(marker string, seed uint64) io.Reader {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	return io.MultiReader(strings.NewReader(marker), rand.NewChaCha8(key))
}

// compare sends n bytes, ends its side, and reads to the end.
func compare(addr string, n int, marker string, seed uint64) (int64, error) {
	c, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(60 * time.Second))
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(c, pattern(marker, seed), int64(n))
		if err == nil {
			err = c.(*net.TCPConn).CloseWrite()
		}
		sent <- err
	}()
	want := pattern(marker, seed)
	got, expected := make([]byte, 64<<10), make([]byte, 64<<10)
	total := 0
	for {
		k, err := c.Read(got)
		_, _ = io.ReadFull(want, expected[:k]) // never ends
		if total+k > n || !bytes.Equal(got[:k], expected[:k]) {
			return int64(total), &wrongError{fmt.Sprintf("%s: bytes %d to %d of %d differ", addr, total, total+k, n)}
		}
		total += k
		if err == io.EOF {
			break
		}
		if err != nil {
			_ = c.Close() // ends the sender
			<-sent
			return int64(total), err
		}
	}
	if total < n {
		// An end in order before all came back, unless sending failed: then the
		// client knows.
		_ = c.Close()
		if err := <-sent; err != nil {
			return int64(total), err
		}
		return int64(total), &wrongError{fmt.Sprintf("%s: ended in order after %d of %d bytes", addr, total, n)}
	}
	return int64(total), <-sent
}
