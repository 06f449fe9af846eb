package record

import (
	"encoding/binary"
	"io"
)

// contentType is what a record carries (https://www.rfc-editor.org/rfc/rfc8446#section-5.1).
type contentType byte

const (
	typeAlert     contentType = 21
	typeHandshake contentType = 22
	typeData      contentType = 23
)

// Messages that may follow a handshake (https://www.rfc-editor.org/rfc/rfc8446#section-4.6).
const (
	msgNewSessionTicket = 4
	msgKeyUpdate        = 24
)

// uselessLimit is how many records without application data may come in a row: tickets, key updates, empty records.
const uselessLimit = 32

// Opener opens the records of one direction. After its first error it returns that error for ever.
type Opener struct {
	keys
	client bool
	out    *Sealer // owes an answer to KeyUpdate requests

	useless int
	hand    handshakeReader
	err     error
}

// Whole returns the length of the record at the beginning of b, or 0 while b does not hold all of it. What cannot
// become a record is an error before the rest of it is waited for.
func (o *Opener) Whole(b []byte) (int, error) {
	if o.err != nil {
		return 0, o.err
	}
	if len(b) == 0 {
		return 0, nil
	}
	if contentType(b[0]) != typeData { // all that is protected looks like application data
		return 0, o.fail(fault(UnexpectedMessage, "unprotected record"))
	}
	if len(b) < HeaderLen {
		return 0, nil
	}
	n := HeaderLen + int(binary.BigEndian.Uint16(b[3:]))
	if n > MaxRecord {
		return 0, o.fail(fault(RecordOverflow, ""))
	}
	if len(b) < n {
		return 0, nil
	}
	return n, nil
}

// Open opens one whole record in place and returns the application data in it, which is none for records about the
// connection itself. io.EOF is the peer's close_notify. The memory of b is the caller's, and b's content is lost.
func (o *Opener) Open(b []byte) ([]byte, error) {
	if o.err != nil {
		return nil, o.err
	}
	if len(b) < HeaderLen+1+tagLen {
		return nil, o.fail(fault(BadRecordMAC, ""))
	}
	body := b[HeaderLen:]
	p, err := o.aead.Open(body[:0], o.next(), body, b[:HeaderLen])
	if err != nil {
		return nil, o.fail(fault(BadRecordMAC, ""))
	}
	if len(p) > MaxPlaintext+1 {
		return nil, o.fail(fault(RecordOverflow, ""))
	}
	n := len(p)
	for n > 0 && p[n-1] == 0 { // padding
		n--
	}
	if n == 0 {
		return nil, o.fail(fault(UnexpectedMessage, "record without content type"))
	}
	typ := contentType(p[n-1])
	p = p[:n-1]
	if typ == typeData && len(p) > 0 && !o.hand.partial() {
		o.useless = 0
		return p, nil
	}
	if err := o.other(typ, p); err != nil {
		return nil, o.fail(err)
	}
	return nil, nil
}

// other handles what is no application data.
func (o *Opener) other(typ contentType, p []byte) error {
	if o.useless++; o.useless > uselessLimit {
		return fault(UnexpectedMessage, "too many records without data")
	}
	if o.hand.partial() && typ != typeHandshake {
		return fault(UnexpectedMessage, "handshake message interrupted")
	}
	switch typ {
	case typeData:
		return nil // empty: allowed, and counted
	case typeAlert:
		return o.alert(p)
	case typeHandshake:
		return o.handshake(p)
	}
	return fault(UnexpectedMessage, "unknown content type")
}

func (o *Opener) alert(p []byte) error {
	if len(p) != 2 {
		return fault(DecodeError, "alert")
	}
	switch a := Alert(p[1]); a { // the level is implied: https://www.rfc-editor.org/rfc/rfc8446#section-6
	case CloseNotify:
		return io.EOF
	case UserCanceled:
		return nil // close_notify follows
	default:
		return &Error{Alert: a, Remote: true}
	}
}

func (o *Opener) handshake(p []byte) error {
	if len(p) == 0 {
		return fault(UnexpectedMessage, "empty handshake record")
	}
	for len(p) > 0 {
		rest, done, err := o.hand.read(p, o.client)
		if err != nil {
			return err
		}
		p = rest
		if !done || o.hand.typ != msgKeyUpdate {
			continue // a ticket: we do not resume
		}
		if len(p) > 0 {
			return fault(UnexpectedMessage, "data after KeyUpdate") // it would span a key change
		}
		switch o.hand.request {
		case 1:
			o.out.owesUpdate.Store(true)
		case 0:
		default:
			return fault(IllegalParameter, "KeyUpdate")
		}
		if err := o.update(); err != nil {
			return fault(InternalError, err.Error())
		}
	}
	return nil
}

// fail notes how the direction ended.
func (o *Opener) fail(err error) error {
	o.err = err
	o.wipe()
	return err
}

// handshakeReader follows post-handshake messages through records without keeping them.
type handshakeReader struct {
	head    [4]byte
	n       int // of head
	left    int // of the body
	typ     byte
	request byte // body of a KeyUpdate
}

func (h *handshakeReader) partial() bool { return h.n > 0 }

// maxTicket bounds a NewSessionTicket: nonce, ticket and extensions with their lengths.
const maxTicket = 3 * (1 << 16)

// read consumes p up to the end of one message and reports whether the message is complete.
func (h *handshakeReader) read(p []byte, client bool) (rest []byte, done bool, err error) {
	if h.n < len(h.head) {
		k := copy(h.head[h.n:], p)
		h.n += k
		p = p[k:]
		if h.n < len(h.head) {
			return p, false, nil
		}
		h.typ = h.head[0]
		h.left = int(h.head[1])<<16 | int(h.head[2])<<8 | int(h.head[3])
		switch {
		case h.typ == msgKeyUpdate && h.left != 1:
			return nil, false, fault(DecodeError, "KeyUpdate")
		case h.typ == msgKeyUpdate:
		case h.typ == msgNewSessionTicket && client && h.left <= maxTicket:
		default:
			return nil, false, fault(UnexpectedMessage, "handshake message")
		}
	}
	k := min(h.left, len(p))
	if h.typ == msgKeyUpdate && k > 0 {
		h.request = p[0]
	}
	h.left -= k
	if h.left > 0 {
		return p[k:], false, nil
	}
	h.n = 0
	return p[k:], true, nil
}
