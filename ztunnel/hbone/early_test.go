package hbone

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

func saying(s string) func() []byte { return func() []byte { return []byte(s) } }

// earlyServer serves CONNECTs: the first that says something gets refuse, the others 200. What each has said before its
// answer is noted.
type earlyServer struct {
	mu     sync.Mutex
	heard  []string
	refuse func(f *framer, id uint32)
}

func (e *earlyServer) serve(_ int, f *framer) {
	f.accept()
	id := uint32(0)
	answer := func(said string) {
		e.mu.Lock()
		refuse := e.refuse
		e.heard = append(e.heard, said)
		if said != "" {
			e.refuse = nil
		}
		e.mu.Unlock()
		if said != "" && refuse != nil {
			refuse(f, id)
		} else {
			f.answer(id)
		}
	}
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			return
		}
		switch fr := fr.(type) {
		case *http2.MetaHeadersFrame:
			if id = fr.StreamID; fr.PseudoValue("authority") == "quiet:1" {
				answer("")
			}
		case *http2.DataFrame:
			if len(fr.Data()) > 0 {
				answer(string(fr.Data()))
			}
		}
	}
}

// Bytes that went along with a request may have reached an application: they go to nobody else, unless the peer says
// that nobody has got them.
func TestEarlyBytesAreSentAgainOnlyOnThePeersWord(t *testing.T) {
	for _, tt := range []struct {
		name   string
		refuse func(f *framer, id uint32)
		idle   time.Duration // before the request that is refused
		heard  []string
		status int
		fails  bool
	}{
		{"REFUSED_STREAM", func(f *framer, id uint32) { f.ok(f.WriteRSTStream(id, http2.ErrCodeRefusedStream)) }, 0, []string{"", "hello", "hello"}, 0, false},
		{"GOAWAY", func(f *framer, id uint32) { f.ok(f.WriteGoAway(id-2, 0, nil)) }, 0, []string{"", "hello", "hello"}, 0, false},
		{"dead tunnel", func(f *framer, id uint32) { _ = f.raw.Reset() }, 0, []string{"", "hello"}, 0, true},
		{"CANCEL", func(f *framer, id uint32) { f.ok(f.WriteRSTStream(id, http2.ErrCodeCancel)) }, 0, []string{"", "hello"}, 0, true},
		{"end without an answer", func(f *framer, id uint32) { f.ok(f.WriteData(id, true, nil)) }, 0, []string{"", "hello"}, 0, true},
		{"503", func(f *framer, id uint32) { f.request(id, ":status", "503") }, 0, []string{"", "hello"}, 503, true},
		{"answered", nil, 0, []string{"", "hello"}, 0, false},
		{"tunnel not heard of lately", nil, earlyFresh + 1, []string{""}, 0, true}, // its server waits for the bytes
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				srv := &earlyServer{refuse: tt.refuse}
				d, k := dialTo(t, DialerConfig{}, srv.serve)
				warm, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "quiet:1"})
				if err != nil {
					t.Fatal(err)
				}
				defer warm.Close()
				time.Sleep(tt.idle)
				s, resp, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1", Early: saying("hello")})
				if (err != nil) != tt.fails {
					t.Fatalf("connect: %v", err)
				}
				if de, ok := errors.AsType[*DialError](err); ok && (de.Refused() || de.Gone()) {
					t.Errorf("%v: the caller would try elsewhere", err)
				}
				if se, ok := errors.AsType[*StatusError](err); ok != (tt.status != 0) || ok && se.Code != tt.status {
					t.Errorf("connect: %v, want status %d", err, tt.status)
				}
				if err == nil {
					if resp.Early != 5 {
						t.Errorf("%d bytes are said to have gone early, want 5", resp.Early)
					}
					defer s.Close()
				}
				_ = d.Close()
				srv.mu.Lock()
				defer srv.mu.Unlock()
				if !slices.Equal(srv.heard, tt.heard) {
					t.Errorf("the servers heard %q, want %q", srv.heard, tt.heard)
				}
			})
		})
	}
}

// dialToSilence returns a dialer with a tunnel that was heard of just now, to a peer that says nothing any more.
func dialToSilence(t *testing.T) (*Dialer, Key) {
	t.Helper()
	d, k := dialTo(t, DialerConfig{}, pingAnswerer(1, false))
	warm, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = warm.Close() })
	return d, k
}

// Nor are they when the peer falls silent. Where there is somebody else the connection fails early: its application may
// ask again.
func TestEarlyBytesToASilentPeer(t *testing.T) {
	for elsewhere, after := range map[bool]time.Duration{true: Silence, false: 10 * time.Second} {
		bubble(t, func(t *testing.T) {
			d, k := dialToSilence(t)
			begin := time.Now()
			_, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1", Elsewhere: func() bool { return elsewhere }, Early: saying("hello")})
			de, ok := errors.AsType[*DialError](err)
			if !ok || de.Gone() || de.Refused() || !de.Timeout() || errors.Is(err, ErrUncertain) != elsewhere || time.Since(begin) != after {
				t.Errorf("elsewhere %v: connect: %v after %v, want %v", elsewhere, err, time.Since(begin), after)
			}
			_ = d.Close()
		})
	}
}

// Nor when it leaves, and falls silent: that it is dead now does not say that it was then.
func TestEarlyBytesOfAPeerThatLeaves(t *testing.T) {
	bubble(t, func(t *testing.T) {
		d, k := dialToSilence(t)
		begin := time.Now()
		left := time.AfterFunc(time.Second/2, func() { d.Gone(func(Key) bool { return true }) })
		defer left.Stop()
		_, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1", Elsewhere: always, Early: saying("hello")})
		de, ok := errors.AsType[*DialError](err)
		if !ok || de.Gone() || de.Refused() || !de.Timeout() || time.Since(begin) != Silence {
			t.Errorf("connect: %v after %v", err, time.Since(begin))
		}
		_ = d.Close()
	})
}

// No more goes early than the peer's windows allow.
func TestEarlyBytesKeepToTheWindow(t *testing.T) {
	bubble(t, func(t *testing.T) { // where the tunnel has always just been heard of
		m, acc := newPairs(t, memPair)
		defer m.close()
		c, _ := streamPair(t, m, acc)
		c.t.w.mu.Lock()
		c.t.w.initialWindow = 3
		c.t.w.mu.Unlock()
		s, resp, err := m.Connect(t.Context(), m.key, ConnectRequest{Authority: "192.0.2.2:80", Early: saying("question")})
		if err != nil || resp.Early != 3 {
			t.Fatalf("%+v, %v: want 3 bytes early", resp, err)
		}
		got := make([]byte, 3)
		if _, err := io.ReadFull(<-acc, got); err != nil || string(got) != "que" {
			t.Errorf("the server read %q, %v", got, err)
		}
		_ = s.Close()
	})
}

// Nor does anything where the tunnel's queue is full: who opens many streams queues no more than who writes to them.
func TestEarlyBytesKeepToTheQueue(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, acc := newPairs(t, memPair)
		defer m.close()
		c, _ := streamPair(t, m, acc)
		w := c.t.w
		full := func(n int) {
			w.mu.Lock()
			w.queued += n
			w.mu.Unlock()
		}
		full(2 * queueLimit)
		s, resp, err := m.Connect(t.Context(), m.key, ConnectRequest{Authority: "192.0.2.2:80", Early: saying("question")})
		if err != nil || resp.Early != 0 {
			t.Fatalf("%+v, %v: want nothing early", resp, err)
		}
		full(-2 * queueLimit)
		_ = s.Close()
	})
}

// What nobody waits for goes with what leaves next, or soon.
func TestFarewellsMayBeLate(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, acc := newPairs(t, memPair)
		c, s := streamPair(t, m, acc)
		eof := func(s *Stream) time.Duration {
			began := time.Now()
			if n, err := s.Read(make([]byte, 1)); err != io.EOF {
				t.Fatalf("read %d, %v, want the end", n, err)
			}
			return time.Since(began)
		}
		say := func(from, to *Stream) {
			t.Helper()
			if _, err := from.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(to, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		say(c, s)
		_ = c.CloseWrite()
		if d := eof(s); d != 0 {
			t.Errorf("the end of a question came after %v", d)
		}
		say(s, c)
		_ = s.CloseWrite()
		if d := eof(c); d != 0 {
			t.Errorf("the end of an answer came after %v", d)
		}

		c, s = streamPair(t, m, acc)
		say(c, s)
		say(s, c)
		_ = c.CloseWrite()
		other, _ := streamPair(t, m, acc)
		if d := eof(s); d != 0 {
			t.Errorf("a farewell with company came after %v", d)
		}

		c, s = streamPair(t, m, acc)
		say(c, s)
		say(s, c)
		synctest.Wait() // who is still flushing would take it along
		_ = c.CloseWrite()
		if d := eof(s); d != lateLimit {
			t.Errorf("a farewell came after %v, want %v", d, lateLimit)
		}
		synctest.Wait()
		_ = s.CloseWrite()
		if d := eof(c); d != lateLimit {
			t.Errorf("its answer came after %v, want %v", d, lateLimit)
		}
		_, _, _ = s.Close(), c.Close(), other.Close()
		m.close()
	})
}

// Farewells that waited for nothing make the next ones leave at once: a server may read to the end of one connection before
// it takes the next.
func TestFarewellsDoNotWaitForNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, acc := newPairs(t, memPair)
		bye := func(company bool) time.Duration {
			c, s := streamPair(t, m, acc)
			defer func() { _, _ = c.Close(), s.Close() }()
			if _, err := s.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // who is still flushing would take it along
			began := time.Now()
			_ = c.CloseWrite()
			if company {
				other, _ := streamPair(t, m, acc)
				defer other.Close()
			}
			if n, err := s.Read(make([]byte, 1)); err != io.EOF {
				t.Fatalf("read %d, %v, want the end", n, err)
			}
			return time.Since(began)
		}
		late := 0
		for range farewellsNeed + aloneLeast + 1 + 2*aloneLeast + 1 {
			d := bye(false)
			if d != 0 && d != lateLimit {
				t.Errorf("a farewell came after %v", d)
			}
			if d != 0 {
				late++
			}
		}
		if late != farewellsNeed+2 {
			t.Errorf("%d farewells waited, want %d", late, farewellsNeed+2)
		}
		for range 4*aloneLeast + 1 {
			if d := bye(true); d != 0 {
				t.Errorf("a farewell with company came after %v", d)
			}
		}
		for range 3 * farewellsNeed { // the last one had company, and now each second or so has
			if d := bye(false); d != lateLimit {
				t.Errorf("a farewell came after %v, want %v", d, lateLimit)
			}
			if d := bye(true); d != 0 {
				t.Errorf("a farewell with company came after %v", d)
			}
		}
		m.close()
	})
}

// The answer to a CONNECT that came with a question leaves with the answer to that, or soon.
func TestAnswersLeaveTogether(t *testing.T) {
	for name, thinks := range map[string]time.Duration{"at once": lateLimit / 2, "later": time.Second} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m := newMesh(t, meshConfig{Dial: memPair, Handler: func(_ context.Context, r *Request) {
					synctest.Wait() // until the question has come
					s, err := r.Accept()
					if err != nil {
						t.Error(err)
						return
					}
					defer s.Close()
					if r.Authority == "warm:1" {
						return
					}
					time.Sleep(thinks)
					_, _ = s.Write([]byte("answer"))
				}})
				warm, _, err := m.Connect(t.Context(), m.key, ConnectRequest{Authority: "warm:1"})
				if err != nil {
					t.Fatal(err)
				}
				defer warm.Close()
				began := time.Now()
				s, _, err := m.Connect(t.Context(), m.key, ConnectRequest{Authority: "a:1", Early: saying("question")})
				if err != nil {
					t.Fatal(err)
				}
				if took, want := time.Since(began), min(thinks, lateLimit); took != want {
					t.Errorf("connected after %v, want %v", took, want)
				}
				if got, err := io.ReadAll(s); string(got) != "answer" || err != nil || time.Since(began) != thinks {
					t.Errorf("read %q, %v after %v", got, err, time.Since(began))
				}
				_ = s.Close()
				m.close()
			})
		})
	}
}

// An answer that waited for nothing makes the next ones leave at once: a client that says in two writes what it has to
// say, of which the second waits for the answer, is late once in a while and not each time.
func TestAnswersDoNotWaitForNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := newMesh(t, meshConfig{Dial: memPair, Handler: func(_ context.Context, r *Request) {
			synctest.Wait() // until the first half has come
			s, err := r.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			n := len("questionquestion")
			if r.Authority == "quick:1" {
				n /= 2
			}
			if _, err := io.ReadFull(s, make([]byte, n)); err == nil {
				_, _ = s.Write([]byte("answer"))
			}
			_, _ = io.Copy(io.Discard, s)
		}})
		warm, _, err := m.Connect(t.Context(), m.key, ConnectRequest{Authority: "quick:1"})
		if err != nil {
			t.Fatal(err)
		}
		defer warm.Close()
		ask := func(authority string) time.Duration {
			began := time.Now()
			s, _, err := m.Connect(t.Context(), m.key, ConnectRequest{Authority: authority, Early: saying("question")})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if _, err := s.Write([]byte("question")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(s, make([]byte, 6)); err != nil {
				t.Fatal(err)
			}
			return time.Since(began)
		}
		late := 0
		for range 1 + aloneLeast + 1 + 2*aloneLeast + 1 {
			d := ask("two:1")
			if d != 0 && d != lateLimit {
				t.Errorf("asked for %v", d)
			}
			if d != 0 {
				late++
			}
		}
		if late != 3 {
			t.Errorf("%d answers waited, want 3", late)
		}
		for range aloneMost {
			if d := ask("quick:1"); d != 0 {
				t.Errorf("an answer at once took %v", d)
			}
		}
		if d := ask("two:1"); d != lateLimit { // they had company
			t.Errorf("asked for %v, want %v", d, lateLimit)
		}
		m.close()
	})
}
