package record

import (
	"encoding/binary"
	"errors"
	"sync/atomic"
)

// keyLimit is how many records one key protects: RFC 8446 section 5.5 allows 2^24.5 full ones under AES-GCM.
const keyLimit = 1 << 24

// UpdateLen is the length of a KeyUpdate's record.
const UpdateLen = len(keyUpdate) + Overhead

// keyUpdate is KeyUpdate(update_not_requested), https://www.rfc-editor.org/rfc/rfc8446#section-4.6.3.
var keyUpdate = [...]byte{msgKeyUpdate, 0, 0, 1, 0}

// Sealer makes the records of one direction.
type Sealer struct {
	keys
	closed     bool
	limit      uint64      // of records per key; 0: keyLimit
	owesUpdate atomic.Bool // set by the Opener
}

// errKeyLimit: the caller did not ask Due.
var errKeyLimit = errors.New("record: key used up")

// Seal appends the record of p, at most MaxPlaintext bytes, to dst. The content type goes behind p while p is sealed:
// p must have one byte of capacity beyond its length, which nobody else may use meanwhile and which is restored. p may
// be dst's own memory, HeaderLen behind dst's end. Before each record the caller asks whether a KeyUpdate is due.
func (s *Sealer) Seal(dst, p []byte) ([]byte, error) {
	switch {
	case s.closed:
		return dst, ErrClosed
	case s.seq >= s.most()-2: // one is left for the KeyUpdate, one for the closing alert
		return dst, errKeyLimit
	}
	return s.seal(dst, p, typeData), nil
}

// LimitKey makes each key protect at most n records, its KeyUpdate included, where that is less than the cipher allows.
// n must be at least 3.
func (s *Sealer) LimitKey(n uint64) { s.limit = min(n, keyLimit) }

func (s *Sealer) most() uint64 {
	if s.limit != 0 {
		return s.limit
	}
	return keyLimit
}

// Due reports whether the next record must be a KeyUpdate: the peer asked for one, or the key has done its share.
func (s *Sealer) Due() bool {
	return !s.closed && (s.owesUpdate.Load() || s.seq >= s.most()-2)
}

// SealUpdate appends a KeyUpdate and moves on to the next key.
func (s *Sealer) SealUpdate(dst []byte) ([]byte, error) {
	if s.closed {
		return dst, ErrClosed
	}
	s.owesUpdate.Store(false) // before the key changes: a request that comes now is a new one
	msg := make([]byte, len(keyUpdate), len(keyUpdate)+1)
	copy(msg, keyUpdate[:])
	dst = s.seal(dst, msg, typeHandshake)
	return dst, s.update()
}

// SealAlert appends the alert that ends this direction: close_notify, or what the Opener found wrong. Nothing can be
// sealed after it.
func (s *Sealer) SealAlert(dst []byte, a Alert) ([]byte, error) {
	if s.closed {
		return dst, ErrClosed
	}
	level := byte(2)
	if a == CloseNotify {
		level = 1
	}
	dst = s.seal(dst, append(make([]byte, 0, 3), level, byte(a)), typeAlert)
	s.closed = true
	s.wipe()
	return dst, nil
}

func (s *Sealer) seal(dst, p []byte, typ contentType) []byte {
	n := len(p)
	if n > MaxPlaintext {
		panic("BUG: record: plaintext over 2^14 bytes")
	}
	dst = append(dst, byte(typeData), 3, 3, 0, 0)
	head := dst[len(dst)-HeaderLen:]
	binary.BigEndian.PutUint16(head[3:], uint16(n+1+tagLen))
	inner := p[:n+1]
	kept := inner[n]
	inner[n] = byte(typ)
	dst = s.aead.Seal(dst, s.next(), inner, head)
	if &dst[len(dst)-1-tagLen] != &inner[n] { // sealed in place: it is ciphertext now
		inner[n] = kept
	}
	return dst
}
