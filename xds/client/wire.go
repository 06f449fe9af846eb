package client

import (
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // what requests are written with
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// codec leaves responses as they came: one of a whole mesh has tens of thousands of resources and tens of megabytes, of
// which most are known. Decoding it at once would hold a processor for as long as that takes and copy everything twice.
type codec struct{}

func (codec) Name() string { return "proto" }

func (codec) Marshal(v any) (mem.BufferSlice, error) {
	return encoding.GetCodecV2("proto").Marshal(v)
}

func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	r, ok := v.(*response)
	if !ok {
		return fmt.Errorf("decode xds response: into a %T", v)
	}
	data.Ref() // until free
	r.data = data
	return nil
}

// pieces reads a message that came in pieces.
type pieces struct {
	cur  []byte
	rest mem.BufferSlice
	left int // in cur and rest
}

func newPieces(data mem.BufferSlice) pieces { return pieces{rest: data, left: data.Len()} }

// fill makes cur not empty; there is something left.
func (p *pieces) fill() {
	for len(p.cur) == 0 {
		p.cur, p.rest = p.rest[0].ReadOnlyData(), p.rest[1:]
	}
}

// maxVarint is how long one is at most.
const maxVarint = 10

func (p *pieces) varint() (uint64, error) {
	if len(p.cur) < min(maxVarint, p.left) { // it may go on in the next piece
		var b [maxVarint]byte
		n := 0
		for ; n < len(b) && p.left > 0; n++ {
			p.fill()
			b[n], p.cur = p.cur[0], p.cur[1:]
			if p.left--; b[n] < 0x80 {
				n++
				break
			}
		}
		v, used := protowire.ConsumeVarint(b[:n])
		if used < 0 {
			return 0, protowire.ParseError(used)
		}
		return v, nil
	}
	v, n := protowire.ConsumeVarint(p.cur)
	if n < 0 {
		return 0, protowire.ParseError(n)
	}
	p.cur, p.left = p.cur[n:], p.left-n
	return v, nil
}

func (p *pieces) tag() (protowire.Number, protowire.Type, error) {
	v, err := p.varint()
	if err != nil {
		return 0, 0, err
	}
	num, typ := protowire.DecodeTag(v)
	return num, typ, validNumber(num)
}

var errFieldNumber = errors.New("a field's number is none")

func validNumber(num protowire.Number) error {
	if num < protowire.MinValidNumber || num > protowire.MaxValidNumber {
		return errFieldNumber
	}
	return nil
}

// bytes is what comes next with its length, in one piece: a part of the message, or a copy where it lies in several.
func (p *pieces) bytes() ([]byte, error) {
	n, err := p.varint()
	if err != nil {
		return nil, err
	}
	if n > uint64(p.left) {
		return nil, io.ErrUnexpectedEOF
	}
	return p.take(int(n)), nil
}

// take is the next n bytes, of which there are that many.
func (p *pieces) take(n int) []byte {
	if n == 0 {
		return nil
	}
	p.left -= n
	if p.fill(); len(p.cur) >= n {
		b := p.cur[:n:n]
		p.cur = p.cur[n:]
		return b
	}
	b := make([]byte, 0, n)
	for len(b) < n {
		p.fill()
		k := min(n-len(b), len(p.cur))
		b, p.cur = append(b, p.cur[:k]...), p.cur[k:]
	}
	return b
}

// discard passes over what comes next with its length.
func (p *pieces) discard() error {
	n, err := p.varint()
	if err != nil {
		return err
	}
	if n > uint64(p.left) {
		return io.ErrUnexpectedEOF
	}
	p.left -= int(n)
	for n > 0 {
		p.fill()
		k := min(n, uint64(len(p.cur)))
		p.cur, n = p.cur[k:], n-k
	}
	return nil
}

// skip passes over a field of which nothing but its number and type was read.
func (p *pieces) skip(num protowire.Number, typ protowire.Type) error {
	if typ == protowire.BytesType {
		return p.discard()
	}
	if typ == protowire.VarintType {
		_, err := p.varint()
		return err
	}
	var b []byte
	switch typ {
	case protowire.Fixed32Type:
		b = p.take(min(4, p.left))
	case protowire.Fixed64Type:
		b = p.take(min(8, p.left))
	case protowire.StartGroupType: // nobody sends one: it is not worth the care that a field deserves
		b = p.take(p.left)
	}
	n := protowire.ConsumeFieldValue(num, typ, b)
	if n < 0 {
		return protowire.ParseError(n)
	}
	if typ == protowire.StartGroupType {
		p.cur, p.rest, p.left = b[n:], nil, len(b)-n
	}
	return nil
}
