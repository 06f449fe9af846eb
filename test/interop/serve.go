package interop

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Ports of the server in a pod, one per behaviour.
const (
	portEcho    = 7001  // sends back what it gets
	portSink    = 7002  // reads until the end, then says how much it was and its hash
	portDuplex  = 7003  // header {seed, n}: both sides send n bytes at once, then the server the hash of what it got
	portGreet   = 7004  // speaks first
	portAbort   = 7005  // reads a line, then resets
	portObserve = 7006  // reads a token, then remembers how the connection ended
	portAsk     = 7007  // token → how that connection ended
	portWho     = 7008  // says who calls
	portOther   = 7009  // echo again, for policies by port
	portBye     = 7010  // says bye and half-closes, then reads a token and data until the end
	portReady   = 7011  // the readiness probe's; closed while the pod plays unready
	portSwitch  = 7012  // "ready" or "unready"
	portDrop    = 7013  // reads until the end and says only how much it was
	portTunnel  = 15088 // a waypoint's application: PROXY protocol in front, answers what it said
	portNobody  = 7099  // nothing listens
)

// server is the state that its ports share.
type server struct {
	mu    sync.Mutex
	ended map[string]string // token → how; guarded by mu
	wakec chan struct{}     // closed and replaced on each change; guarded by mu
	ready net.Listener      // guarded by mu; nil while unready
}

// serve listens on all ports until ctx ends.
func serve(ctx context.Context) error {
	s := &server{ended: map[string]string{}, wakec: make(chan struct{})}
	ports := map[uint16]func(*net.TCPConn) error{
		portEcho: echoBack, portOther: echoBack, portSink: sink, portDuplex: duplexServer, portGreet: greet, portAbort: abort,
		portObserve: s.observe, portAsk: s.ask, portWho: who, portBye: s.bye, portSwitch: s.turn, portDrop: drop, portTunnel: tunnelled,
	}
	if err := s.setReady(true); err != nil {
		return err
	}
	errc := make(chan error, len(ports))
	for port, handle := range ports {
		ln, err := net.Listen("tcp", ":"+strconv.Itoa(int(port)))
		if err != nil {
			return err
		}
		defer ln.Close()
		go func() { errc <- acceptLoop(ln, handle) }()
	}
	select {
	case err := <-errc:
		return err
	case <-ctx.Done():
		time.Sleep(leaving)
		return nil
	}
}

// leaving is how long a server that was told to end goes on, as servers should:
// callers learn of its end only afterwards.
const leaving = time.Second

func acceptLoop(ln net.Listener, handle func(*net.TCPConn) error) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			if err := handle(c.(*net.TCPConn)); err != nil { // a TCP listener gives nothing else
				fmt.Fprintf(os.Stderr, "%s → %s: %v\n", c.RemoteAddr(), c.LocalAddr(), err)
			}
		}()
	}
}

func echoBack(c *net.TCPConn) error {
	_, err := io.Copy(c, c)
	return err
}

func sink(c *net.TCPConn) error {
	h := sha256.New()
	n, err := io.Copy(h, c)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c, "%d %s\n", n, hex.EncodeToString(h.Sum(nil)))
	return err
}

func drop(c *net.TCPConn) error {
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 256<<10))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(c, n)
	return err
}

// bytesOf is an endless reader of the same bytes for the same seed.
func bytesOf(seed uint64) io.Reader {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return rand.NewChaCha8(key)
}

// exchange sends n bytes of seed out and reads n bytes, at the same time. It
// returns the hashes of what went and of what came.
func exchange(c net.Conn, out uint64, n int64) (sent, got hash.Hash, err error) {
	sent, got = sha256.New(), sha256.New()
	errc := make(chan error, 1)
	go func() {
		_, err := io.CopyBuffer(c, io.TeeReader(io.LimitReader(bytesOf(out), n), sent), make([]byte, 256<<10))
		errc <- err
	}()
	_, err = io.CopyBuffer(got, io.LimitReader(c, n), make([]byte, 256<<10))
	return sent, got, errors.Join(err, <-errc)
}

func duplexServer(c *net.TCPConn) error {
	var head [16]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return err
	}
	seed, n := binary.BigEndian.Uint64(head[:]), int64(binary.BigEndian.Uint64(head[8:]))
	_, got, err := exchange(struct{ net.Conn }{c}, seed+1, n)
	if err != nil {
		return err
	}
	_, err = c.Write(got.Sum(nil))
	return err
}

func greet(c *net.TCPConn) error {
	if _, err := io.WriteString(c, "the server speaks first\n"); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	_, err = io.WriteString(c, "got "+line)
	return err
}

func abort(c *net.TCPConn) error {
	if _, err := bufio.NewReader(c).ReadString('\n'); err != nil {
		return err
	}
	return c.SetLinger(0) // the close that follows is an RST
}

func (s *server) observe(c *net.TCPConn) error {
	r := bufio.NewReader(c)
	token, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	if _, err := io.WriteString(c, "ok\n"); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	s.note(strings.TrimSpace(token), ending(err))
	return nil
}

// bye is the half-close that the server makes.
func (s *server) bye(c *net.TCPConn) error {
	if _, err := io.WriteString(c, "bye\n"); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	r := bufio.NewReader(c)
	token, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, r)
	s.note(strings.TrimSpace(token), fmt.Sprintf("%d %s", n, ending(err)))
	return nil
}

// ending is how a connection ended for its reader.
func ending(err error) string {
	switch {
	case err == nil || errors.Is(err, io.EOF):
		return "eof"
	case errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE):
		return "reset"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "timeout"
	default:
		return err.Error()
	}
}

func (s *server) note(token, how string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended[token] = how
	close(s.wakec)
	s.wakec = make(chan struct{})
}

func (s *server) ask(c *net.TCPConn) error {
	token, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	limit := time.After(8 * time.Second)
	for {
		s.mu.Lock()
		how, ok := s.ended[strings.TrimSpace(token)]
		wakec := s.wakec
		s.mu.Unlock()
		if ok {
			_, err := fmt.Fprintln(c, how)
			return err
		}
		select {
		case <-wakec:
		case <-limit:
			_, err := fmt.Fprintln(c, "still open")
			return err
		}
	}
}

func who(c *net.TCPConn) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	a, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c, "%s %s\n", host, a.Addr().Unmap())
	return err
}

func (s *server) turn(c *net.TCPConn) error {
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if err := s.setReady(strings.TrimSpace(line) == "ready"); err != nil {
		return err
	}
	_, err = io.WriteString(c, "ok\n")
	return err
}

func (s *server) setReady(on bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if on == (s.ready != nil) {
		return nil
	}
	if !on {
		err := s.ready.Close()
		s.ready = nil
		return err
	}
	ln, err := net.Listen("tcp", ":"+strconv.Itoa(portReady))
	if err != nil {
		return err
	}
	s.ready = ln
	go func() { _ = acceptLoop(ln, func(*net.TCPConn) error { return nil }) }() // ends when it is closed
	return nil
}

// proxied is what a PROXY protocol header says.
type proxied struct {
	command  byte
	src      netip.Addr
	dst      netip.AddrPort
	identity string // of TLV 0xD0
}

// readProxied reads a header of version 2.
// https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt
func readProxied(r io.Reader) (p proxied, err error) {
	var head [16]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return p, err
	}
	if string(head[:12]) != "\r\n\r\n\x00\r\nQUIT\n" {
		return p, fmt.Errorf("no PROXY header: %q", head)
	}
	rest := make([]byte, binary.BigEndian.Uint16(head[14:]))
	if _, err := io.ReadFull(r, rest); err != nil {
		return p, err
	}
	size := map[byte]int{0x11: 4, 0x21: 16}[head[13]]
	if size == 0 || len(rest) < 2*size+4 {
		return p, fmt.Errorf("PROXY header of family %#x with %d bytes", head[13], len(rest))
	}
	p.command = head[12]
	p.src, _ = netip.AddrFromSlice(rest[:size]) // of a length that fits
	dst, _ := netip.AddrFromSlice(rest[size : 2*size])
	p.dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(rest[2*size+2:]))
	for tlv := rest[2*size+4:]; len(tlv) >= 3; {
		n := int(binary.BigEndian.Uint16(tlv[1:]))
		if len(tlv) < 3+n {
			return p, errors.New("TLV longer than its header")
		}
		if tlv[0] == 0xD0 {
			p.identity = string(tlv[3 : 3+n])
		}
		tlv = tlv[3+n:]
	}
	return p, nil
}

// tunnelled answers with what the header says.
func tunnelled(c *net.TCPConn) error {
	p, err := readProxied(c)
	if err != nil {
		_, werr := fmt.Fprintln(c, err)
		return errors.Join(err, werr)
	}
	_, err = fmt.Fprintf(c, "command=%#x src=%s dst=%s identity=%s from=%s\n", p.command, p.src, p.dst, p.identity, c.RemoteAddr())
	return err
}

// forward passes connections on to another address, byte by byte; a gateway first
// takes the PROXY header off. What is left is the inner tunnel, which it cannot
// read.
func forward(ctx context.Context, listen, target string, gateway bool) error {
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = ln.Close() })
	return acceptLoop(ln, func(c *net.TCPConn) error {
		if gateway {
			if _, err := readProxied(c); err != nil {
				return err
			}
		}
		up, err := net.Dial("tcp", target)
		if err != nil {
			return err
		}
		defer up.Close()
		errc := make(chan error, 1)
		go func() {
			_, err := io.Copy(up, c)
			errc <- errors.Join(err, up.(*net.TCPConn).CloseWrite())
		}()
		_, err = io.Copy(c, up)
		return errors.Join(err, c.CloseWrite(), <-errc)
	})
}
