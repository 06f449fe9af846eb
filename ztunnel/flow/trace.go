package flow

import (
	"crypto/rand"
	"encoding/hex"
)

// Trace names a connection across proxies: a W3C trace context
// (https://www.w3.org/TR/trace-context/#traceparent-header). The id is the
// whole connection's, the span one proxy's part of it.
type Trace struct {
	ID   [16]byte
	Span [8]byte
}

// traceParentLen is the length of a version 00 header.
const traceParentLen = 2 + 1 + 32 + 1 + 16 + 1 + 2

// maxTraceParent bounds headers of later versions, which may be longer.
const maxTraceParent = 256

// ParseTraceParent reads a traceparent header. It is strict, because what it
// takes is logged: lower-case hex of the right length, neither id all zero. Of
// later versions it reads what they share with version 00, as the
// specification asks (§4.1.4); version ff is none.
func ParseTraceParent(s string) (Trace, bool) {
	var tr Trace
	if len(s) < traceParentLen || len(s) > maxTraceParent || s[2] != '-' || s[35] != '-' || s[52] != '-' {
		return tr, false
	}
	var version, flags [1]byte
	if !unhex(version[:], s[:2]) || !unhex(tr.ID[:], s[3:35]) || !unhex(tr.Span[:], s[36:52]) || !unhex(flags[:], s[53:55]) {
		return Trace{}, false
	}
	switch {
	case version[0] == 0xff, version[0] == 0 && len(s) != traceParentLen, len(s) > traceParentLen && s[traceParentLen] != '-':
		return Trace{}, false
	case tr.ID == [16]byte{}, tr.Span == [8]byte{}:
		return Trace{}, false
	}
	return tr, true
}

// unhex decodes lower-case hex: the specification forbids upper case.
func unhex(dst []byte, s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	_, err := hex.Decode(dst, []byte(s))
	return err == nil
}

// newTrace is a trace that begins here.
func newTrace() (tr Trace) {
	var b [24]byte
	for tr.ID == [16]byte{} || tr.Span == [8]byte{} { // zero means "none"; the loop is for the proof
		_, _ = rand.Read(b[:]) // never fails (crypto/rand)
		copy(tr.ID[:], b[:16])
		copy(tr.Span[:], b[16:])
	}
	return tr
}

// IsZero reports a connection that has no trace.
func (tr Trace) IsZero() bool { return tr.ID == [16]byte{} }

// String is the id, as the log has it.
func (tr Trace) String() string {
	if tr.IsZero() {
		return ""
	}
	var b [32]byte
	hex.Encode(b[:], tr.ID[:])
	return string(b[:])
}

// Header is the traceparent to send. Flags are 0: nobody samples here.
func (tr Trace) Header() string {
	b := make([]byte, traceParentLen)
	copy(b, "00-")
	hex.Encode(b[3:], tr.ID[:])
	b[35] = '-'
	hex.Encode(b[36:], tr.Span[:])
	copy(b[52:], "-00")
	return string(b)
}

// Join makes the connection part of the peer's trace, if its header is well
// formed; otherwise it keeps its own. Call it before Describe.
func (c *Conn) Join(traceparent string) {
	if tr, ok := ParseTraceParent(traceparent); ok {
		c.trace.ID = tr.ID // the span stays this proxy's
	}
}

// TraceParent is the W3C header that the connection's next hop gets.
func (c *Conn) TraceParent() string { return c.trace.Header() }
