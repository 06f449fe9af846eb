package hbone

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
)

var (
	// ErrTunnelClosed is what streams and callers see when their tunnel was cut from our side.
	ErrTunnelClosed = errors.New("hbone tunnel closed")
	// ErrServerClosed is returned by ServeConn after Shutdown or Close.
	ErrServerClosed = errors.New("hbone server closed")
	// ErrDialerClosed is returned by Connect after Shutdown or Close.
	ErrDialerClosed = errors.New("hbone dialer closed")
	// ErrTooManyHandshakes is why a source's further connections are reset before their handshake.
	ErrTooManyHandshakes = errors.New("too many handshakes under way from this address")
	// errRefused marks a stream that the peer certainly has not processed: it may be tried again elsewhere
	// (https://www.rfc-editor.org/rfc/rfc9113#section-8.7).
	errRefused = errors.New("stream refused by peer")
	// errUnanswered is a stream that ended before its answer, and may have been processed.
	errUnanswered = errors.New("stream ended before its answer")
	// ErrSilent is why a CONNECT is given up whose peer does not answer a PING either.
	ErrSilent = fmt.Errorf("peer has fallen silent: %w", os.ErrDeadlineExceeded)
	// ErrUncertain is that of a peer that may have passed bytes on before: they are for nobody else, those of the next
	// connection are.
	ErrUncertain = fmt.Errorf("peer has fallen silent after it was sent the first bytes: %w", os.ErrDeadlineExceeded)
	// ErrGone is why a CONNECT is given up whose peer has left: see Dialer.Gone.
	ErrGone = errors.New("peer has left the mesh")
	// errNoAnswer is why a dial is not waited for any more, by who has somewhere else to go.
	errNoAnswer = fmt.Errorf("no answer for %v: %w", Silence, os.ErrDeadlineExceeded)
	// errPingTimeout is why a silent tunnel is cut.
	errPingTimeout = errors.New("peer answers no PING")
)

// Stage names the step of opening a tunnel that failed. The set is closed: it is a metric label.
type Stage string

const (
	StageTCP     Stage = "tcp"     // TCP connection to the peer's HBONE port
	StageTLS     Stage = "tls"     // handshake and verification of the peer
	StageH2      Stage = "h2"      // preface and SETTINGS
	StageConnect Stage = "connect" // CONNECT request and its answer
	StageLocal   Stage = "local"   // our own limits refused
)

// DialError says at which stage and to whom a tunnel could not be opened.
type DialError struct {
	Stage Stage
	Addr  netip.AddrPort
	Err   error
}

func (e *DialError) Error() string {
	if e.Stage == StageTCP && e.Timeout() {
		return fmt.Sprintf("dial hbone %s: %s: %v (maybe a NetworkPolicy is blocking HBONE port %d)", e.Addr, e.Stage, e.Err, e.Addr.Port())
	}
	return fmt.Sprintf("dial hbone %s: %s: %v", e.Addr, e.Stage, e.Err)
}

func (e *DialError) Unwrap() error { return e.Err }

// Timeout reports whether the peer did not answer in time, as opposed to answering no.
func (e *DialError) Timeout() bool {
	if errors.Is(e.Err, os.ErrDeadlineExceeded) {
		return true
	}
	ne, ok := errors.AsType[net.Error](e.Err)
	return ok && ne.Timeout()
}

// Refused reports whether the peer certainly has not processed the request: it may be tried elsewhere.
func (e *DialError) Refused() bool { return errors.Is(e.Err, errRefused) }

// Gone reports whether the peer's proxy has fallen silent or left: our request has no answer, and may have been
// processed all the same. Nothing was sent in the stream, and it was reset.
func (e *DialError) Gone() bool { return errors.Is(e.Err, ErrSilent) || errors.Is(e.Err, ErrGone) }

// StatusError is an answer to CONNECT other than 200.
type StatusError struct {
	Code   int
	Reason string // what the peer said beyond the code, usually nothing
}

func (e *StatusError) Error() string {
	if e.Reason != "" {
		return fmt.Sprintf("http status: %d: %s", e.Code, e.Reason)
	}
	return fmt.Sprintf("http status: %d", e.Code)
}

// ErrCode is an HTTP/2 error code (https://www.rfc-editor.org/rfc/rfc9113#section-7).
type ErrCode uint32

const (
	CodeNo              ErrCode = 0x0
	CodeProtocol        ErrCode = 0x1
	CodeInternal        ErrCode = 0x2
	CodeFlowControl     ErrCode = 0x3
	CodeSettingsTimeout ErrCode = 0x4
	CodeStreamClosed    ErrCode = 0x5
	CodeFrameSize       ErrCode = 0x6
	CodeRefusedStream   ErrCode = 0x7
	CodeCancel          ErrCode = 0x8
	CodeCompression     ErrCode = 0x9
	CodeConnect         ErrCode = 0xa
	CodeCalm            ErrCode = 0xb
)

var codeNames = [...]string{
	"NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED",
	"FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM",
}

func (c ErrCode) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return fmt.Sprintf("error code %#x", uint32(c))
}

// ConnError ends a whole tunnel: what we found wrong with the peer, or what the peer's GOAWAY said about us.
type ConnError struct {
	Code   ErrCode
	Remote bool // the peer sent it
	Reason string
}

func (e *ConnError) Error() string {
	who := "peer broke protocol"
	if e.Remote {
		who = "peer closed tunnel"
	}
	if e.Reason == "" {
		return fmt.Sprintf("%s: %s", who, e.Code)
	}
	return fmt.Sprintf("%s: %s: %s", who, e.Code, e.Reason)
}

// Is makes a lost tunnel look like a reset connection to those who only know sockets.
func (e *ConnError) Is(target error) bool { return target == syscall.ECONNRESET }

// ResetError is what reads and writes return after RST_STREAM. It is a syscall.ECONNRESET to errors.Is.
type ResetError struct {
	Code   ErrCode
	Remote bool
}

func (e *ResetError) Error() string {
	if e.Remote {
		return "stream reset by peer: " + e.Code.String()
	}
	return "stream reset: " + e.Code.String()
}

func (e *ResetError) Is(target error) bool {
	return target == syscall.ECONNRESET || e.Code == CodeRefusedStream && target == errRefused
}

// lostError wraps whatever ended the transport, so that streams see a reset.
type lostError struct{ err error }

func (e *lostError) Error() string        { return "tunnel lost: " + e.err.Error() }
func (e *lostError) Unwrap() error        { return e.err }
func (e *lostError) Is(target error) bool { return target == syscall.ECONNRESET }

// ServeError says at which stage a peer's connection to us ended and why.
type ServeError struct {
	Stage  Stage
	Remote netip.AddrPort
	Err    error
}

func (e *ServeError) Error() string {
	return fmt.Sprintf("serve hbone %s: %s: %v", e.Remote, e.Stage, e.Err)
}

func (e *ServeError) Unwrap() error { return e.Err }

// opError gives stream errors the shape that net.Conn users expect; EOF stays bare.
func opError(op string, s *Stream, err error) error {
	if err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "hbone", Source: s.LocalAddr(), Addr: s.RemoteAddr(), Err: err}
}
