package hbone

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// HeaderField is one header of a request or response. Names are lower case, as on the wire.
type HeaderField struct{ Name, Value string }

// Header is a received header list in wire order.
type Header []HeaderField

// Get returns the first value of name (lower case), or "".
func (h Header) Get(name string) string {
	for _, f := range h {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

// Values returns all values of name (lower case) in wire order.
func (h Header) Values(name string) []string {
	var vs []string
	for _, f := range h {
		if f.Name == name {
			vs = append(vs, f.Value)
		}
	}
	return vs
}

// Entries of the static table that we use (https://www.rfc-editor.org/rfc/rfc7541#appendix-A).
const (
	staticAuthority = 1
	staticMethod    = 2
	staticStatus200 = 8
)

// appendTableSizeZero appends the dynamic table size update that our first header block carries: we never index, and a
// peer that set HEADER_TABLE_SIZE lower than the default may insist on hearing it
// (https://www.rfc-editor.org/rfc/rfc7541#section-4.2).
func appendTableSizeZero(b []byte) []byte { return append(b, 0x20) }

// appendField appends a literal field without indexing: with no dynamic table the encoder is stateless, so header
// blocks of different streams may be made concurrently and in any order.
func appendField(b []byte, name, value string) []byte {
	b = append(b, 0x00)
	b = appendString(b, name)
	return appendString(b, value)
}

// appendIndexedName appends a literal field whose name is in the static table.
func appendIndexedName(b []byte, index byte, value string) []byte {
	b = append(b, index) // four-bit prefix: indexes below 15 fit
	return appendString(b, value)
}

// appendStatus appends :status.
func appendStatus(b []byte, status int) []byte {
	if status == 200 {
		return append(b, 0x80|staticStatus200)
	}
	b = append(b, staticStatus200, 3)
	return strconv.AppendInt(b, int64(status), 10)
}

// appendString appends an unencoded string with its seven-bit prefix length.
func appendString(b []byte, s string) []byte {
	n := len(s)
	if n < 127 {
		b = append(b, byte(n))
		return append(b, s...)
	}
	b = append(b, 127)
	n -= 127
	for n >= 128 {
		b = append(b, byte(n)|0x80)
		n >>= 7
	}
	b = append(b, byte(n))
	return append(b, s...)
}

// checkFields refuses what would not be a header on the wire: these come from our own side, but values such as names
// of workloads are written by users.
func checkFields(fields []HeaderField) error {
	for _, f := range fields {
		if !validName(f.Name) || strings.HasPrefix(f.Name, ":") {
			return fmt.Errorf("header %q: invalid name", f.Name)
		}
		if !validValue(f.Value) {
			return fmt.Errorf("header %s: invalid value", f.Name)
		}
	}
	return nil
}

func validName(s string) bool {
	for i := range len(s) {
		c := s[i]
		if c <= ' ' || c >= 0x7f || c >= 'A' && c <= 'Z' || c == ':' && i > 0 {
			return false
		}
	}
	return s != "" && s != ":"
}

// validValue follows https://www.rfc-editor.org/rfc/rfc9113#section-8.2.1.
func validValue(s string) bool {
	for i := range len(s) {
		if c := s[i]; c == 0 || c == '\r' || c == '\n' {
			return false
		}
	}
	return s == "" || s[0] != ' ' && s[0] != '\t' && s[len(s)-1] != ' ' && s[len(s)-1] != '\t'
}

// head is the decoded header block of a request or response.
type head struct {
	method, authority, scheme, path, protocol string
	status                                    int
	fields                                    Header
	tooLarge                                  bool  // the list exceeded our limit; nothing of it is kept
	malformed                                 error // a stream error of type PROTOCOL_ERROR
}

var (
	errPseudoLate    = errors.New("pseudo-header after regular header")
	errPseudoTwice   = errors.New("repeated pseudo-header")
	errPseudoUnknown = errors.New("unknown pseudo-header")
	errFieldName     = errors.New("invalid header name")
	errFieldValue    = errors.New("invalid header value")
	errFieldConn     = errors.New("connection-specific header")
)

// headDecoder turns header blocks into heads. One per tunnel, used by its reader only.
type headDecoder struct {
	hp    *hpack.Decoder
	limit int // of the decoded list, counted as in RFC 9113 section 6.5.2
	cur   *head
	size  int
}

// newHeadDecoder starts with the protocol's default table: a client may send its first requests, using it, before our
// SETTINGS_HEADER_TABLE_SIZE=0 reaches it.
func newHeadDecoder(limit int) *headDecoder {
	d := &headDecoder{limit: limit}
	d.hp = hpack.NewDecoder(4096, d.emit)
	d.hp.SetMaxStringLength(limit)
	return d
}

// decode decodes one complete header block. An error is a connection error of type COMPRESSION_ERROR.
func (d *headDecoder) decode(block []byte) (*head, error) {
	d.cur, d.size = &head{}, 0
	defer func() { d.cur = nil }()
	d.hp.SetEmitEnabled(true)
	if _, err := d.hp.Write(block); err != nil {
		if errors.Is(err, hpack.ErrStringLength) {
			// The decoder stops inside the block. With no dynamic table there is no state to lose, but a peer that still
			// uses one could be misread from here on: the caller must treat it as the end of the tunnel.
			return nil, fmt.Errorf("header string over %d bytes: %w", d.limit, err)
		}
		return nil, err
	}
	if err := d.hp.Close(); err != nil {
		return nil, err
	}
	return d.cur, nil
}

func (d *headDecoder) emit(f hpack.HeaderField) {
	h := d.cur
	d.size += int(f.Size())
	if d.size > d.limit {
		d.hp.SetEmitEnabled(false)
		*h = head{tooLarge: true}
		return
	}
	if h.malformed != nil {
		return
	}
	if !validName(f.Name) {
		h.malformed = errFieldName
		return
	}
	if !validValue(f.Value) {
		h.malformed = errFieldValue
		return
	}
	if f.Name[0] == ':' {
		h.malformed = h.pseudo(f.Name, f.Value)
		return
	}
	switch f.Name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		h.malformed = errFieldConn
		return
	}
	h.fields = append(h.fields, HeaderField{f.Name, f.Value})
}

func (h *head) pseudo(name, value string) error {
	if len(h.fields) > 0 {
		return errPseudoLate
	}
	set := func(p *string) error {
		if *p != "" {
			return errPseudoTwice
		}
		*p = value
		return nil
	}
	switch name {
	case ":method":
		return set(&h.method)
	case ":authority":
		return set(&h.authority)
	case ":scheme":
		return set(&h.scheme)
	case ":path":
		return set(&h.path)
	case ":protocol":
		return set(&h.protocol)
	case ":status":
		if h.status != 0 {
			return errPseudoTwice
		}
		n, err := strconv.Atoi(value)
		if err != nil || len(value) != 3 || n < 100 {
			return errFieldValue
		}
		h.status = n
		return nil
	}
	return errPseudoUnknown
}
