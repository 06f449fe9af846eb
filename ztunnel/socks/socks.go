// Package socks speaks the server's side of SOCKS version 5 (RFC 1928), for
// applications that say where they want to go instead of being redirected.
//
//	accept ─→ Handshake ─→ resolve ─→ Connect ─→ reply ─→ relay
//	           ≤ 10 s                    │          └ with what became of it
//	                                     └ outbound's whole decision
//
// Only CONNECT, and no authentication: the port is on loopback, and the peer is
// whoever shares the workload's network namespace, as with redirection. The
// reply is sent when the way is open or has failed, so that its code is true.
//
// Serve is called once per connection and returns when it has ended.
package socks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

// handshakeTimeout bounds the whole negotiation (arbitrary; peers are local).
const handshakeTimeout = 10 * time.Second

// Code is the reply's field REP (RFC 1928 section 6).
type Code byte

// The codes.
const (
	Succeeded          Code = 0
	GeneralFailure     Code = 1
	NotAllowed         Code = 2
	NetworkUnreachable Code = 3
	HostUnreachable    Code = 4
	Refused            Code = 5
	TTLExpired         Code = 6
	BadCommand         Code = 7
	BadAddress         Code = 8
)

// Request is what the peer asks for: Addr, or Host if that is set.
type Request struct {
	Host string
	Addr netip.Addr
	Port uint16
}

func (r Request) String() string {
	if r.Host != "" {
		return fmt.Sprintf("%s:%d", r.Host, r.Port)
	}
	return netip.AddrPortFrom(r.Addr, r.Port).String()
}

// Error is a request that is not served, with the reply that says so.
type Error struct {
	Code   Code
	Reason string
}

func (e *Error) Error() string { return "socks: " + e.Reason }

// ErrNotSOCKS5 is a peer that speaks something else; it gets no answer.
var ErrNotSOCKS5 = errors.New("socks: the peer does not speak version 5")

const (
	version    = 5
	noAuth     = 0
	noMethod   = 0xff
	cmdConnect = 1
	typeIPv4   = 1
	typeDomain = 3
	typeIPv6   = 4
)

// Handshake reads a request, not a byte more, and answers what comes before it.
func Handshake(c io.ReadWriter) (Request, error) {
	var b [256]byte
	if _, err := io.ReadFull(c, b[:2]); err != nil {
		return Request{}, fmt.Errorf("socks: read greeting: %w", err)
	}
	if b[0] != version {
		return Request{}, ErrNotSOCKS5
	}
	methods := b[:b[1]]
	if _, err := io.ReadFull(c, methods); err != nil {
		return Request{}, fmt.Errorf("socks: read methods: %w", err)
	}
	answer := byte(noMethod)
	for _, m := range methods {
		if m == noAuth {
			answer = noAuth
		}
	}
	if _, err := c.Write([]byte{version, answer}); err != nil {
		return Request{}, fmt.Errorf("socks: answer greeting: %w", err)
	}
	if answer == noMethod {
		return Request{}, errors.New("socks: the peer insists on authentication, which is not offered")
	}
	return readRequest(c, &b)
}

func readRequest(c io.Reader, b *[256]byte) (r Request, err error) {
	if _, err := io.ReadFull(c, b[:4]); err != nil {
		return r, fmt.Errorf("socks: read request: %w", err)
	}
	if b[0] != version {
		return r, ErrNotSOCKS5
	}
	command, kind := b[1], b[3]
	size := 0
	switch kind {
	case typeIPv4:
		size = 4
	case typeIPv6:
		size = 16
	case typeDomain:
		if _, err := io.ReadFull(c, b[:1]); err != nil {
			return r, fmt.Errorf("socks: read request: %w", err)
		}
		size = int(b[0])
	default:
		return r, &Error{BadAddress, fmt.Sprintf("address type %d is none", kind)}
	}
	var port [2]byte
	if _, err := io.ReadFull(c, b[:size]); err != nil {
		return r, fmt.Errorf("socks: read address: %w", err)
	}
	if _, err := io.ReadFull(c, port[:]); err != nil {
		return r, fmt.Errorf("socks: read port: %w", err)
	}
	r.Port = uint16(port[0])<<8 | uint16(port[1])
	if kind == typeDomain {
		r.Host = string(b[:size])
		if a, err := netip.ParseAddr(r.Host); err == nil {
			r.Host, r.Addr = "", a.WithZone("") // some clients send literals as names
		} else if !validHost(r.Host) {
			return Request{}, &Error{HostUnreachable, fmt.Sprintf("%q is no host name", r.Host)}
		}
	} else {
		r.Addr, _ = netip.AddrFromSlice(b[:size])
	}
	r.Addr = r.Addr.Unmap()
	switch {
	case command != cmdConnect:
		return r, &Error{BadCommand, fmt.Sprintf("command %d is not served, only CONNECT", command)}
	case r.Port == 0:
		return r, &Error{HostUnreachable, "port 0"}
	}
	return r, nil
}

// validHost accepts what can be a DNS name; it goes into logs and lookups.
func validHost(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '.' || c == '_') {
			return false
		}
	}
	return true
}

// Reply writes the answer; bound is the address of the connection made, if any.
func Reply(w io.Writer, code Code, bound netip.AddrPort) error {
	b := []byte{version, byte(code), 0}
	if a := bound.Addr().Unmap(); a.Is6() {
		b = append(append(b, typeIPv6), a.AsSlice()...)
	} else {
		if !a.IsValid() {
			a = netip.IPv4Unspecified()
		}
		b = append(append(b, typeIPv4), a.AsSlice()...)
	}
	b = append(b, byte(bound.Port()>>8), byte(bound.Port()))
	_, err := w.Write(b)
	return err
}

// Config of a Server. All fields are required.
type Config struct {
	// Resolve finds the address of a host name.
	Resolve func(ctx context.Context, host string) (netip.Addr, error)
	// Connect opens the way to dst, calls opened once with what became of it,
	// and relays until the end.
	Connect func(ctx context.Context, c net.Conn, dst netip.AddrPort, opened func(error) error)
	// Refused is told of requests that never came to Connect.
	Refused func(c net.Conn, r Request, err error)
	// Code of an error that Connect reported.
	Code func(error) Code
}

// Server serves connections of one workload.
type Server struct{ cfg Config }

// New returns a Server.
func New(cfg Config) *Server { return &Server{cfg} }

// Serve takes one connection; the caller closes it.
func (s *Server) Serve(ctx context.Context, c net.Conn) {
	if err := c.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return // gone already
	}
	r, err := s.request(ctx, c)
	if err != nil {
		if e, ok := errors.AsType[*Error](err); ok {
			_ = Reply(c, e.Code, netip.AddrPort{}) // then the connection ends
		}
		s.cfg.Refused(c, r, err)
		return
	}
	s.cfg.Connect(ctx, c, netip.AddrPortFrom(r.Addr, r.Port), func(err error) error {
		code := Succeeded
		if err != nil {
			code = s.cfg.Code(err)
			_ = c.SetWriteDeadline(time.Now().Add(handshakeTimeout)) // fails only with the connection
			return Reply(c, code, netip.AddrPort{})
		}
		if err := c.SetDeadline(time.Time{}); err != nil {
			return err
		}
		return Reply(c, code, netip.AddrPort{})
	})
}

// request negotiates until ctx ends.
func (s *Server) request(ctx context.Context, c net.Conn) (Request, error) {
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })() // fails only with the connection
	r, err := Handshake(c)
	if err == nil && r.Host != "" {
		err = s.resolve(ctx, &r)
	}
	return r, err
}

func (s *Server) resolve(ctx context.Context, r *Request) error {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	a, err := s.cfg.Resolve(ctx, r.Host)
	if err != nil {
		return &Error{HostUnreachable, fmt.Sprintf("resolve %s: %v", r.Host, err)}
	}
	r.Addr = a.Unmap()
	return nil
}
