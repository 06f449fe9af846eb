package inspect

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// answering is a Client and the far end of it, which the test plays.
func answering(t *testing.T, answers func(question) answer) *Client {
	t.Helper()
	toFar, fromNear := io.Pipe()
	toNear, fromFar := io.Pipe()
	t.Cleanup(func() { _ = fromNear.Close(); _ = fromFar.Close() })
	go func() {
		var mu sync.Mutex
		dec, enc := json.NewDecoder(toFar), json.NewEncoder(fromFar)
		for {
			var q question
			if dec.Decode(&q) != nil {
				return
			}
			go func() { // as Serve does: who asks may be asking the next
				a := answers(q)
				a.ID = q.ID
				mu.Lock()
				defer mu.Unlock()
				_ = enc.Encode(a) // the test has ended
			}()
		}
	}()
	return NewClient(fromNear, bufio.NewReader(toNear))
}

func TestHeap(t *testing.T) {
	for page, want := range map[string]uint64{
		"# TYPE x\ngo_memstats_heap_inuse_bytes 1.2345e+07\nrest 1\n": 12345000,
		"no Go program\n":                        0,
		"x\ngo_memstats_heap_inuse_bytes many\n": 0,
		"x\ngo_memstats_heap_inuse_bytes -1\n":   0,
	} {
		c := answering(t, func(question) answer { return answer{Body: []byte(page)} })
		if got, ok := c.Heap(t.Context(), 1, "http://x/metrics"); ok != (want > 0) || ok && got != want {
			t.Errorf("%q: %d %t", page, got, ok)
		}
	}
}

func TestGetFails(t *testing.T) {
	c := answering(t, func(question) answer { return answer{Error: "no such process"} })
	if _, err := c.Get(t.Context(), 7, "http://x/"); err == nil || !strings.Contains(err.Error(), "ask process 7: no such process") {
		t.Errorf("got %v", err)
	}
	ended := NewClient(io.Discard, bufio.NewReader(strings.NewReader("")))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := ended.Get(ctx, 7, "http://x/"); err == nil || !strings.Contains(err.Error(), "answers no more") {
		t.Errorf("got %v", err)
	}
}

// The other end may not take a question before its answers have been taken.
func TestAskingWaitsForNoAnswer(t *testing.T) {
	questions, to := io.Pipe()
	answers, from := io.Pipe()
	defer from.Close()
	c := NewClient(to, bufio.NewReader(answers))
	const n = 3
	var live sync.WaitGroup
	for range n {
		live.Go(func() {
			if b, err := c.Get(t.Context(), 1, "http://x"); err != nil || string(b) != "page" {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
	// It answers the first before it has read the second, and so on.
	dec, enc := json.NewDecoder(oneByOne{questions}), json.NewEncoder(from)
	for range n {
		var q question
		if err := dec.Decode(&q); err != nil {
			t.Fatal(err)
		}
		if err := enc.Encode(answer{ID: q.ID, Body: []byte("page")}); err != nil {
			t.Fatal(err)
		}
	}
	go func() { _, _ = io.Copy(io.Discard, questions) }() // the end of the last line; until the test closes it
	live.Wait()
	_ = to.Close()
}

// oneByOne reads no more than a byte at a time, as who does not look ahead.
type oneByOne struct{ r io.Reader }

func (o oneByOne) Read(b []byte) (int, error) { return o.r.Read(b[:1]) }

func TestProfile(t *testing.T) {
	c := answering(t, func(q question) answer {
		if strings.Contains(q.URL, "block") {
			return answer{Error: "no such page"}
		}
		return answer{Body: []byte(q.URL)}
	})
	dir := t.TempDir()
	err := c.Profile(t.Context(), dir, "a/b.round1", Window{For: 1500 * time.Millisecond}, []Target{{Name: "zt@n:1", PID: 3, Admin: "localhost:15000"}})
	if err == nil || !strings.Contains(err.Error(), "profile zt@n:1, block.pb.gz: ask process 3: no such page") {
		t.Errorf("got %v", err)
	}
	for kind, want := range map[string]string{"cpu.pb.gz": "profile?seconds=2", "trace": "trace?seconds=1.0", "heap.pb.gz": "heap", "mutex.pb.gz": "mutex?seconds=2", "allocs.pb.gz": "allocs?seconds=2"} {
		b, err := os.ReadFile(filepath.Join(dir, "a_b.round1.zt@n_1."+kind))
		if err != nil || string(b) != "http://localhost:15000/debug/pprof/"+want {
			t.Errorf("%s: %q, %v", kind, b, err)
		}
	}
}

// Serve asks in the network of a process; this one's own needs no rights beyond
// those that entering a namespace needs.
func TestServe(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/lost" {
			http.Error(w, "not here", http.StatusNotFound)
			return
		}
		fmt.Fprint(w, "page")
	}))
	defer srv.Close()
	in, ask := io.Pipe()
	answers, out := io.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- Serve(t.Context(), in, out) }()
	r := bufio.NewReader(answers)
	if line, err := r.ReadString('\n'); err != nil || line != "{}\n" {
		t.Fatalf("it begins with %q, %v", line, err)
	}
	c := NewClient(ask, r)
	b, err := c.Get(t.Context(), os.Getpid(), srv.URL+"/x")
	if err != nil && strings.Contains(err.Error(), "operation not permitted") {
		t.Skip("entering a network namespace wants CAP_SYS_ADMIN")
	}
	if err != nil || string(b) != "page" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := c.Get(t.Context(), os.Getpid(), srv.URL+"/lost"); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("got %v", err)
	}
	if _, err := c.Get(t.Context(), -1, srv.URL); err == nil {
		t.Error("a process that does not exist answers")
	}
	_ = ask.Close()
	if err := <-ended; err != nil {
		t.Errorf("it ended with %v", err)
	}
}
