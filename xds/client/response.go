package client

import (
	"errors"
	"fmt"
	"unicode/utf8"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/ambit-mesh/ambit/xds/turn"
)

// response is a DeltaDiscoveryResponse as it came. decode and each hand out parts of it, which are valid until free.
//
// What it takes for a response is what proto.Unmarshal takes for one.
// https://protobuf.dev/programming-guides/encoding/
type response struct{ data mem.BufferSlice }

// free gives the bytes back; the response is over then.
func (r *response) free() {
	r.data.Free()
	r.data = nil
}

// size is how many bytes came.
func (r *response) size() int { return r.data.Len() }

// The fields of DeltaDiscoveryResponse, of Resource and of Any.
const (
	fieldSystemVersion, fieldResources, fieldTypeURL, fieldNonce, fieldRemoved = 1, 2, 4, 5, 6

	fieldVersion, fieldValue, fieldName, fieldAliases, fieldTTL = 1, 2, 3, 4, 6

	fieldAnyType, fieldAnyValue = 1, 2
)

var errUTF8 = errors.New("a string is not UTF-8")

// head is all but the resources.
type head struct {
	typeURL, nonce string
	removed        []string
	resources      int // how many there are
}

func (r *response) head(others *turn.Taker) (h head, err error) {
	for p := newPieces(r.data); p.left > 0; others.Next() {
		num, typ, err := p.tag()
		if err != nil {
			return h, fmt.Errorf("decode xds response: %w", err)
		}
		var b []byte
		switch known := typ == protowire.BytesType; {
		case known && num == fieldResources:
			h.resources++
			err = p.discard()
		case known && (num == fieldTypeURL || num == fieldNonce || num == fieldRemoved || num == fieldSystemVersion):
			if b, err = p.bytes(); err == nil && !utf8.Valid(b) {
				err = errUTF8
			}
			switch num {
			case fieldTypeURL:
				h.typeURL = string(b)
			case fieldNonce:
				h.nonce = string(b)
			case fieldRemoved:
				h.removed = append(h.removed, string(b))
			}
		default:
			err = p.skip(num, typ)
		}
		if err != nil {
			return h, fmt.Errorf("decode xds response, field %d: %w", num, err)
		}
	}
	return h, nil
}

// each decodes one resource after the other, after head has found nothing wrong.
func (r *response) each(others *turn.Taker, f func(*rawResource)) error {
	var raw rawResource
	for p := newPieces(r.data); p.left > 0; others.Next() {
		num, typ, err := p.tag()
		if err == nil && (num != fieldResources || typ != protowire.BytesType) {
			err = p.skip(num, typ)
		} else if err == nil {
			var b []byte
			if b, err = p.bytes(); err == nil {
				err = raw.decode(b)
			}
			if err == nil {
				f(&raw)
			}
		}
		if err != nil {
			return fmt.Errorf("decode xds resource %q: %w", raw.name, err)
		}
	}
	return nil
}

// rawResource is one resource's parts.
type rawResource struct {
	name, version, typeURL, value []byte
	aliases                       [][]byte
}

// decode keeps the memory of what was decoded before.
func (r *rawResource) decode(b []byte) error {
	*r = rawResource{aliases: r.aliases[:0]}
	return fields(b, func(num protowire.Number, v []byte) error {
		switch num {
		case fieldVersion:
			r.version = v
		case fieldName:
			r.name = v
		case fieldAliases:
			r.aliases = append(r.aliases, v)
		case fieldValue:
			return fields(v, func(num protowire.Number, v []byte) error {
				switch num {
				case fieldAnyType:
					r.typeURL = v
				case fieldAnyValue:
					r.value = v
					return nil
				default:
					return nil
				}
				return valid(v)
			})
		case fieldTTL: // a message of numbers, which nobody reads
			return fields(v, func(protowire.Number, []byte) error { return nil })
		default:
			return nil
		}
		return valid(v)
	})
}

func valid(s []byte) error {
	if !utf8.Valid(s) {
		return errUTF8
	}
	return nil
}

// fields calls f with each field of a message that has a length, and passes over the others.
func fields(b []byte, f func(num protowire.Number, v []byte) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := validNumber(num); err != nil {
			return err
		}
		b = b[n:]
		if typ != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
				return protowire.ParseError(n)
			}
			b = b[n:]
			continue
		}
		v, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := f(num, v); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
