package record

import (
	"bufio"
	"bytes"
	"context"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/test/sockets"
)

// pair returns an Opener and a Sealer that fit: fresh keys of a suite.
func pair(tb testing.TB, id uint16) (*Opener, *Sealer) {
	tb.Helper()
	s := suites[id]
	secret := make([]byte, s.hash().Size())
	_, _ = rand.Read(secret)
	in, out := &Opener{out: &Sealer{}, client: true}, &Sealer{}
	if err := errors.Join(in.install(s, bytes.Clone(secret)), out.install(s, secret)); err != nil {
		tb.Fatal(err)
	}
	return in, out
}

var bothSuites = []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384}

// text returns s with the room that Seal asks for.
func text(s string) []byte { return append([]byte(s), 0)[:len(s)] }

func (s *Sealer) mustSeal(tb testing.TB, p []byte) []byte {
	tb.Helper()
	b, err := s.Seal(nil, p)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// Every change of a record ends the direction for ever and shows no plaintext.
func TestEveryCorruptionIsFatal(t *testing.T) {
	for _, id := range bothSuites {
		in, out := pair(t, id)
		state := *in
		rec := out.mustSeal(t, text("attack at dawn"))
		for i := range rec {
			for bit := range 8 {
				o := state
				o.hand, o.err = handshakeReader{}, nil
				o.secret = bytes.Clone(state.secret)
				bad := bytes.Clone(rec)
				bad[i] ^= 1 << bit
				n, err := o.Whole(bad)
				if i == 3 || i == 4 { // the length: too short, or more than there is
					if err == nil && n == 0 {
						continue
					}
				}
				var p []byte
				if err == nil {
					p, err = o.Open(bad[:n])
				}
				if e, ok := errors.AsType[*Error](err); !ok || e.Remote || p != nil {
					t.Fatalf("byte %d bit %d: %q, %v: want an alert of ours", i, bit, p, err)
				}
				if _, again := o.Open(bytes.Clone(rec)); again != err {
					t.Fatalf("after %v the next record gives %v", err, again)
				}
			}
		}
	}
}

// raw seals any content under any type, as a hostile peer could.
func raw(out *Sealer, typ contentType, p []byte) []byte {
	return out.seal(nil, append(bytes.Clone(p), 0)[:len(p)], typ)
}

func TestOpenerFaults(t *testing.T) {
	update := func(req byte) []byte { return []byte{msgKeyUpdate, 0, 0, 1, req} }
	many := func(typ contentType, p []byte) (recs []struct {
		t contentType
		p []byte
	}) {
		for range uselessLimit + 1 {
			recs = append(recs, struct {
				t contentType
				p []byte
			}{typ, p})
		}
		return recs
	}
	type rec = struct {
		t contentType
		p []byte
	}
	for _, tt := range []struct {
		name string
		recs []rec
		want Alert
	}{
		{"all padding", []rec{{0, nil}}, UnexpectedMessage},
		{"unknown type", []rec{{20, []byte{1}}}, UnexpectedMessage},
		{"empty handshake", []rec{{typeHandshake, nil}}, UnexpectedMessage},
		{"client hello", []rec{{typeHandshake, []byte{1, 0, 0, 0}}}, UnexpectedMessage},
		{"KeyUpdate of two bytes", []rec{{typeHandshake, []byte{msgKeyUpdate, 0, 0, 2}}}, DecodeError},
		{"KeyUpdate of 2", []rec{{typeHandshake, update(2)}}, IllegalParameter},
		{"data behind KeyUpdate", []rec{{typeHandshake, append(update(0), 4)}}, UnexpectedMessage},
		{"data inside a message", []rec{{typeHandshake, []byte{msgNewSessionTicket, 0}}, {typeData, []byte("x")}}, UnexpectedMessage},
		{"alert of one byte", []rec{{typeAlert, []byte{2}}}, DecodeError},
		{"empty data for ever", many(typeData, nil), UnexpectedMessage},
		{"tickets for ever", many(typeHandshake, []byte{msgNewSessionTicket, 0, 0, 0}), UnexpectedMessage},
		{"user canceled for ever", many(typeAlert, []byte{1, byte(UserCanceled)}), UnexpectedMessage},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in, out := pair(t, bothSuites[0])
			var err error
			for _, r := range tt.recs {
				_, err = in.Open(raw(out, r.t, r.p))
			}
			if e, ok := errors.AsType[*Error](err); !ok || e.Alert != tt.want || e.Remote {
				t.Errorf("%v, want %v", err, tt.want)
			}
		})
	}
	in, out := pair(t, bothSuites[0])
	long := append(make([]byte, MaxPlaintext+1), byte(typeData))
	b := []byte{byte(typeData), 3, 3, 0, 0}
	b[3], b[4] = byte((len(long)+tagLen)>>8), byte(len(long)+tagLen)
	b = out.aead.Seal(b, out.next(), long, b[:HeaderLen])
	if _, err := in.Open(b); err == nil || err.(*Error).Alert != RecordOverflow {
		t.Errorf("plaintext over 2^14: %v", err)
	}
	in, _ = pair(t, bothSuites[0])
	if _, err := in.Whole([]byte{byte(typeData), 3, 3, 0x41, 1}); err == nil || err.(*Error).Alert != RecordOverflow {
		t.Errorf("record over 2^14+256: %v", err)
	}
	in, out = pair(t, bothSuites[0])
	if _, err := in.Open(raw(out, typeAlert, []byte{2, byte(InternalError)})); err == nil || !err.(*Error).Remote {
		t.Errorf("the peer's alert: %v", err)
	}
	in, out = pair(t, bothSuites[0])
	last, _ := out.SealAlert(nil, CloseNotify)
	if _, err := in.Open(last); err != io.EOF {
		t.Errorf("close_notify: %v, want EOF", err)
	}
	if _, err := out.Seal(nil, text("x")); !errors.Is(err, ErrClosed) {
		t.Errorf("sealed after close_notify: %v", err)
	}
}

// watcher sees every use of a key.
type watcher struct {
	cipher.AEAD
	seen map[string]bool
	t    testing.TB
}

func (w *watcher) Seal(dst, nonce, p, ad []byte) []byte {
	if w.seen[string(nonce)] {
		w.t.Errorf("nonce %x used twice under one key", nonce)
	}
	w.seen[string(nonce)] = true
	return w.AEAD.Seal(dst, nonce, p, ad)
}

// No (key, sequence) is used twice: not by data, updates of either cause, nor the last alert; and keys change in time.
func TestNoNonceTwice(t *testing.T) {
	for _, id := range bothSuites {
		in, out := pair(t, id)
		keysSeen := 0
		out.watch = func(a cipher.AEAD) cipher.AEAD {
			keysSeen++
			return &watcher{a, map[string]bool{}, t}
		}
		out.aead = out.watch(out.aead)
		out.limit = 50
		var got, want bytes.Buffer
		for i := range 1000 {
			if i%130 == 7 {
				out.owesUpdate.Store(true)
			}
			var b []byte
			if out.Due() {
				b, _ = out.SealUpdate(b)
			}
			p := text(fmt.Sprint(i, ","))
			b, err := out.Seal(b, p)
			if err != nil {
				t.Fatal(err)
			}
			if out.seq > out.limit {
				t.Fatalf("%d records under one key", out.seq)
			}
			want.Write(p)
			for len(b) > 0 {
				n, _ := in.Whole(b)
				p, err := in.Open(b[:n])
				if err != nil {
					t.Fatal(err)
				}
				got.Write(p)
				b = b[n:]
			}
		}
		if _, err := out.SealAlert(nil, CloseNotify); err != nil {
			t.Fatal(err)
		}
		if got.String() != want.String() || keysSeen < 20 {
			t.Errorf("%d keys, text equal %v", keysSeen, got.String() == want.String())
		}
	}
	_, out := pair(t, bothSuites[0])
	out.limit = 10
	for range 8 {
		out.mustSeal(t, text("x"))
	}
	if _, err := out.Seal(nil, text("x")); err == nil {
		t.Error("a used up key seals on")
	}
}

// oneRecord gives crypto/tls bytes of one record per Read, as the package asks of its callers.
type oneRecord struct {
	net.Conn
	head []byte
	left int
}

func (c *oneRecord) Read(p []byte) (int, error) {
	if c.left == 0 && len(c.head) == 0 {
		c.head = make([]byte, HeaderLen)
		if _, err := io.ReadFull(c.Conn, c.head); err != nil {
			return 0, err
		}
		c.left = int(c.head[3])<<8 | int(c.head[4])
	}
	if len(c.head) > 0 {
		n := copy(p, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	n, err := c.Conn.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

// conn is a net.Conn of sorts on our records, one record per Read and Write.
type conn struct {
	net.Conn
	in  *Opener
	out *Sealer
	mu  sync.Mutex
	buf []byte
	r   *bufio.Reader
}

func takeOver(c net.Conn, cfg *tls.Config, client bool) (*conn, error) {
	cfg, secrets := Capture(cfg)
	one := &oneRecord{Conn: c}
	t := tls.Server(one, cfg)
	if client {
		t = tls.Client(one, cfg)
	}
	if err := t.HandshakeContext(context.Background()); err != nil {
		return nil, err
	}
	cs := t.ConnectionState()
	in, out, err := Takeover(&cs, secrets, client)
	if err != nil {
		return nil, err
	}
	return &conn{Conn: c, in: in, out: out, r: bufio.NewReader(c)}, nil
}

func (c *conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	done := 0
	for len(p) > 0 {
		var b []byte
		var err error
		if c.out.Due() {
			if b, err = c.out.SealUpdate(b); err != nil {
				return done, err
			}
		}
		k := min(len(p), MaxPlaintext)
		if b, err = c.out.Seal(b, text(string(p[:k]))); err != nil {
			return done, err
		}
		if _, err := c.Conn.Write(b); err != nil {
			return done, err
		}
		done += k
		p = p[k:]
	}
	return done, nil
}

func (c *conn) Read(p []byte) (int, error) {
	for len(c.buf) == 0 {
		b := make([]byte, HeaderLen, MaxRecord)
		if _, err := io.ReadFull(c.r, b); err != nil {
			return 0, err
		}
		b = b[:HeaderLen+int(b[3])<<8+int(b[4])]
		if _, err := io.ReadFull(c.r, b[HeaderLen:]); err != nil {
			return 0, err
		}
		var err error
		if c.buf, err = c.in.Open(b); err != nil {
			return 0, err
		}
	}
	n := copy(p, c.buf)
	c.buf = c.buf[n:]
	return n, nil
}

var leaf = sync.OnceValue(func() tls.Certificate {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<33, 0)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
})

func configs() (client, server *tls.Config) {
	return &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13},
		&tls.Config{Certificates: []tls.Certificate{leaf()}, MinVersion: tls.VersionTLS13}
}

func tcp(t *testing.T) (a, b net.Conn) {
	t.Helper()
	return sockets.Pair(t)
}

// crypto/tls as the peer, in both roles (its server sends tickets), with chunks of any size both ways.
func TestAgainstCryptoTLS(t *testing.T) {
	for _, client := range []bool{true, false} {
		t.Run(fmt.Sprintf("client=%v", client), func(t *testing.T) {
			ccfg, scfg := configs()
			a, b := tcp(t)
			cfg, theirs := ccfg, tls.Server(b, scfg)
			if !client {
				cfg, theirs = scfg, tls.Client(b, ccfg)
			}
			go func() { _ = theirs.Handshake() }()
			ours, err := takeOver(a, cfg, client)
			if err != nil {
				t.Fatal(err)
			}
			data := make([]byte, 1<<20)
			_, _ = rand.Read(data)
			send := func(w io.Writer, seed uint64) {
				r := mrand.New(mrand.NewPCG(seed, 1))
				for p := data; len(p) > 0; {
					k := min(len(p), 1+r.IntN(40000))
					if _, err := w.Write(p[:k]); err != nil {
						t.Error(err)
						return
					}
					p = p[k:]
				}
			}
			var wg sync.WaitGroup
			defer wg.Wait()
			wg.Go(func() { send(ours, 1) })
			wg.Go(func() { send(theirs, 2) })
			wg.Go(func() {
				got := make([]byte, len(data))
				if _, err := io.ReadFull(theirs, got); err != nil || !bytes.Equal(got, data) {
					t.Errorf("theirs read: %v", err)
				}
			})
			got := make([]byte, len(data))
			if _, err := io.ReadFull(ours, got); err != nil || !bytes.Equal(got, data) {
				t.Errorf("ours read: %v", err)
			}
		})
	}
}

// OpenSSL as the peer, in both roles and suites, with its KeyUpdates: K asks for ours, too.
func TestAgainstOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("no openssl in PATH")
	}
	dir := t.TempDir()
	key, _ := x509.MarshalPKCS8PrivateKey(leaf().PrivateKey)
	file := filepath.Join(dir, "leaf.pem")
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf().Certificate[0]}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, suite := range []string{"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"} {
		for _, client := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s client=%v", suite, client), func(t *testing.T) {
				ln, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				addr := ln.Addr().String()
				ccfg, scfg := configs()
				ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
				defer cancel()
				var args []string
				if client {
					_ = ln.Close()
					args = []string{"s_server", "-accept", addr, "-naccept", "1", "-cert", file, "-key", file, "-ciphersuites", suite}
				} else {
					defer ln.Close()
					args = []string{"s_client", "-connect", addr, "-ciphersuites", suite}
				}
				cmd := exec.CommandContext(ctx, openssl, args...)
				stdin, _ := cmd.StdinPipe()
				var out lockedBuffer
				cmd.Stdout, cmd.Stderr = &out, &out
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				defer func() {
					cancel()
					_ = cmd.Wait()
				}()
				var c net.Conn
				if client {
					for c == nil && ctx.Err() == nil {
						c, _ = net.Dial("tcp", addr)
					}
				} else if c, err = ln.Accept(); err != nil {
					t.Fatal(err)
				}
				if c == nil {
					t.Fatal("s_server never listened")
				}
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(60 * time.Second))
				cfg := ccfg
				if !client {
					cfg = scfg
				}
				ours, err := takeOver(c, cfg, client)
				if err != nil {
					t.Fatal(err)
				}
				for i, cmd := range []string{"", "k", "K"} {
					word := fmt.Sprintf("hello %d from openssl\n", i)
					if cmd != "" {
						_, _ = io.WriteString(stdin, cmd+"\n")
						if _, err := ours.r.Peek(1); err != nil { // it reads its commands apart from its text
							t.Fatalf("no KeyUpdate after %q: %v", cmd, err)
						}
					}
					_, _ = io.WriteString(stdin, word)
					got := make([]byte, len(word))
					if _, err := io.ReadFull(ours, got); err != nil || string(got) != word {
						t.Fatalf("after %q: read %q, %v\n%s", cmd, got, err, out.String())
					}
					answer := fmt.Sprintf("answer %d\n", i)
					if _, err := io.WriteString(ours, answer); err != nil {
						t.Fatal(err)
					}
					if !out.await(ctx, answer, 1) {
						t.Fatalf("after %q openssl did not get %q:\n%s", cmd, answer, out.String())
					}
				}
			})
		}
	}
}

// lockedBuffer collects a program's output.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lockedBuffer) await(ctx context.Context, s string, n int) bool {
	for tick := time.NewTicker(time.Millisecond); ; {
		if strings.Count(l.String(), s) >= n {
			tick.Stop()
			return true
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			tick.Stop()
			return false
		}
	}
}

func TestSecretsAreWiped(t *testing.T) {
	ccfg, scfg := configs()
	var theirs bytes.Buffer
	scfg.KeyLogWriter = &theirs
	outer := &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return scfg, nil }}
	a, b := tcp(t)
	go func() { _ = tls.Client(b, ccfg).Handshake() }()
	cfg, s := Capture(outer)
	c := tls.Server(&oneRecord{Conn: a}, cfg)
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	kept := s.client
	cs := c.ConnectionState()
	if _, _, err := Takeover(&cs, s, false); err != nil {
		t.Fatal(err)
	}
	if len(kept) == 0 || !bytes.Equal(kept, make([]byte, len(kept))) {
		t.Errorf("secret left: %s", hex.EncodeToString(kept))
	}
}

func FuzzOpen(f *testing.F) {
	f.Add([]byte("\x17\x03\x03\x00\x13"), []byte("\x18\x00\x00\x01\x01"), uint8(typeHandshake))
	f.Add([]byte{}, []byte("\x04\x00\x00\x02ab\x04\x00\x00\x01c"), uint8(typeHandshake))
	f.Add([]byte{}, []byte("\x01\x00"), uint8(typeAlert))
	f.Add([]byte{}, []byte("text\x00\x00"), uint8(typeData))
	f.Add([]byte{}, []byte("0\x1700"), uint8(0)) // content, type and padding
	f.Fuzz(func(t *testing.T, garbage, inner []byte, typ uint8) {
		in, out := pair(t, bothSuites[0])
		if len(inner) > MaxPlaintext {
			return
		}
		for _, cut := range [][]byte{inner[:len(inner)/2], inner[len(inner)/2:]} { // authentic, whatever it says
			want := bytes.TrimRight(append(bytes.Clone(cut), typ), "\x00") // what is behind the content type is padding
			isData := len(want) > 0 && contentType(want[len(want)-1]) == typeData
			p, err := in.Open(raw(out, contentType(typ), cut))
			if len(p) > 0 && (!isData || !bytes.Equal(p, want[:len(want)-1])) {
				t.Fatalf("%q of type %d opened as %q, %v", cut, typ, p, err)
			}
			if err != nil {
				break
			}
		}
		in, _ = pair(t, bothSuites[0])
		if n, err := in.Whole(garbage); err == nil && n > 0 {
			if p, err := in.Open(garbage[:n]); err == nil || p != nil {
				t.Fatal("garbage opened")
			}
		}
	})
}
