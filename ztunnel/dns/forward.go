package dns

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// Dial opens a socket of the pod's, with the proxy's mark. A UDP socket is
// connected, so that the kernel lets only the server's datagrams in, and has a
// port that the kernel draws at random.
type Dial func(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error)

// Resolvers' first timeout is 5 s (resolv.conf(5)): an answer after that finds
// nobody.
const upstreamTimeout = 5 * time.Second

var (
	errLength   = errors.New("message of a length that no message has")
	errTooLarge = errors.New("the server answered with more than the client takes")
)

// What a query under way may hold is counted in places of ledger.Queries: one is
// a socket, a goroutine and smallBuffer bytes; a client that takes larger
// datagrams, or talks TCP, takes as many as its buffers are larger.
const (
	smallBuffer = 4096
	largeQuery  = 16
)

var (
	buffers      = sync.Pool{New: func() any { return new([maxMessage + 2]byte) }}
	smallBuffers = sync.Pool{New: func() any { return new([smallBuffer + 1]byte) }} // one more, to tell what does not fit
)

// places a datagram takes while it waits for somebody.
func (m *message) places() int64 {
	if m.udpSize > smallBuffer {
		return largeQuery
	}
	return 1
}

// buffer has room for every answer that the client takes.
func (m *message) buffer() (buf []byte, free func()) {
	if m.places() > 1 {
		b := buffers.Get().(*[maxMessage + 2]byte)
		return b[:], func() { buffers.Put(b) }
	}
	b := smallBuffers.Get().(*[smallBuffer + 1]byte)
	return b[:], func() { smallBuffers.Put(b) }
}

// exchange asks the server over UDP and returns its answer, in buf, with the
// client's id, and the server: its address may have stood for another. Late,
// forged and foreign datagrams are ignored until the deadline.
func exchange(ctx context.Context, dial Dial, server netip.AddrPort, m *message, buf []byte) ([]byte, netip.AddrPort, error) {
	c, err := dial(ctx, "udp", server)
	if err != nil {
		return nil, server, err
	}
	defer c.Close()
	server = addrPort(c.RemoteAddr())
	reply, err := exchangeOn(ctx, c, m, buf)
	return reply, server, err
}

func exchangeOn(ctx context.Context, c net.Conn, m *message, buf []byte) ([]byte, error) {
	defer watch(ctx, c)()
	out := buf[:len(m.raw)]
	copy(out, m.raw)
	id := newID()
	binary.BigEndian.PutUint16(out, id)
	if _, err := c.Write(out); err != nil {
		return nil, ended(ctx, err)
	}
	for {
		n, err := c.Read(buf)
		if err != nil {
			return nil, ended(ctx, err)
		}
		if answers(buf[:n], id, m.question) {
			if n == len(buf) {
				return nil, errTooLarge
			}
			binary.BigEndian.PutUint16(buf, m.id)
			return buf[:n], nil
		}
	}
}

// watch gives a connection ctx's deadline and ends its reads with ctx: the end of
// a pod ends its questions.
func watch(ctx context.Context, c net.Conn) (stop func()) {
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline) // a connection that is closed fails anyway
	end := context.AfterFunc(ctx, func() { interrupt(c) })
	return func() { end() }
}

// interrupt wakes whoever waits for c.
func interrupt(c net.Conn) { _ = c.SetDeadline(time.Unix(1, 0)) }

// ended tells a question that was given up from one that failed.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// newID draws an id that nobody can guess (RFC 5452 §9.2).
func newID() uint16 {
	var b [2]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return binary.BigEndian.Uint16(b[:])
}

// answers reports whether b is the response to our question: RFC 5452 §9.1. Old
// servers send errors about what they do not understand without the question;
// such a header carries nothing but its error.
func answers(b []byte, id uint16, question []byte) bool {
	if len(b) < headerLen || binary.BigEndian.Uint16(b) != id {
		return false
	}
	flags := binary.BigEndian.Uint16(b[2:])
	if flags&bitQR == 0 || flags&opcodes != 0 {
		return false
	}
	switch binary.BigEndian.Uint16(b[4:]) {
	case 0:
		rcode := dnsmessage.RCode(flags & rcodes)
		return len(b) == headerLen && (rcode == dnsmessage.RCodeFormatError || rcode == dnsmessage.RCodeNotImplemented)
	case 1:
		return len(b) >= headerLen+len(question) && sameQuestion(b[headerLen:headerLen+len(question)], question)
	}
	return false
}

// sameQuestion compares without regard to letter case, which some servers do not
// keep: RFC 4343. A length byte is below 64 and no letter.
func sameQuestion(a, b []byte) bool {
	name := len(b) - 4
	return bytes.Equal(a[name:], b[name:]) && equalFold(a[:name], b[:name])
}

func equalFold(a, b []byte) bool {
	for i := range b {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// Over TCP each message has its length before it: RFC 1035 §4.2.2.

func readMessage(r io.Reader, buf []byte) ([]byte, error) {
	n, err := readLength(r)
	if err != nil {
		return nil, err
	}
	return readBody(r, buf, n)
}

func readLength(r io.Reader) (int, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, err
	}
	n := int(binary.BigEndian.Uint16(head[:]))
	if n < headerLen {
		return 0, fmt.Errorf("%w: %d bytes", errLength, n)
	}
	return n, nil
}

func readBody(r io.Reader, buf []byte, n int) ([]byte, error) {
	_, err := io.ReadFull(r, buf[:n])
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return buf[:n], err
}

// writeMessage writes length and message at once: some servers take the length
// alone for an attack.
func writeMessage(w io.Writer, buf *[maxMessage + 2]byte, b []byte) error {
	binary.BigEndian.PutUint16(buf[:], uint16(len(b)))
	n := copy(buf[2:], b)
	_, err := w.Write(buf[:2+n])
	return err
}

// stream is the connection to the server behind one TCP connection of a pod's. It
// belongs to that connection's goroutine.
type stream struct {
	dial   Dial
	server netip.AddrPort
	conn   net.Conn // nil: none yet, or it has ended
	buf    *[maxMessage + 2]byte
}

func (s *stream) close() {
	if s.conn != nil {
		_ = s.conn.Close() // nothing unsent matters
		s.conn = nil
	}
}

// ask sends a question and returns its answer. A kept connection that the server
// has ended in the meantime is replaced once.
func (s *stream) ask(ctx context.Context, m *message, buf []byte) ([]byte, error) {
	kept := s.conn != nil
	b, err := s.askOnce(ctx, m, buf)
	if err != nil && kept && ctx.Err() == nil {
		b, err = s.askOnce(ctx, m, buf)
	}
	return b, err
}

func (s *stream) askOnce(ctx context.Context, m *message, buf []byte) (answer []byte, err error) {
	if err := s.send(ctx, m, newID()); err != nil {
		return nil, err
	}
	defer watch(ctx, s.conn)()
	id := binary.BigEndian.Uint16(s.buf[2:])
	for {
		b, err := readMessage(s.conn, buf)
		if err != nil {
			s.close()
			return nil, ended(ctx, err)
		}
		if answers(b, id, m.question) {
			binary.BigEndian.PutUint16(b, m.id)
			return b, nil
		}
	}
}

// send writes m with another id, on a connection that it opens if need be.
func (s *stream) send(ctx context.Context, m *message, id uint16) error {
	if s.conn == nil {
		c, err := s.dial(ctx, "tcp", s.server)
		if err != nil {
			return err
		}
		s.conn = c
	}
	defer watch(ctx, s.conn)()
	if err := writeMessage(s.conn, s.buf, withID(s.buf, m.raw, id)); err != nil {
		s.close()
		return ended(ctx, err)
	}
	return nil
}

// withID copies raw to where writeMessage wants it, with another id.
func withID(buf *[maxMessage + 2]byte, raw []byte, id uint16) []byte {
	b := buf[2 : 2+len(raw)]
	copy(b, raw)
	binary.BigEndian.PutUint16(b, id)
	return b
}

// transfer passes a zone transfer on: many messages, whose end only the two sides
// know (RFC 5936 §2.2). The connection is of no further use.
func (s *stream) transfer(ctx context.Context, m *message, client io.Writer, idle time.Duration, buf []byte) error {
	defer s.close()
	if err := s.send(ctx, m, m.id); err != nil {
		return err
	}
	c := s.conn
	defer context.AfterFunc(ctx, func() { interrupt(c) })()
	for {
		_ = s.conn.SetDeadline(time.Now().Add(idle)) // as in watch
		if ctx.Err() != nil {
			return context.Cause(ctx) // the line above undid the interruption
		}
		b, err := readMessage(s.conn, buf)
		if err != nil {
			return ended(ctx, err)
		}
		if err := writeMessage(client, s.buf, b); err != nil {
			return ended(ctx, err)
		}
	}
}
