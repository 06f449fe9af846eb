package hbone

import "encoding/binary"

// frameType is an HTTP/2 frame type (https://www.rfc-editor.org/rfc/rfc9113#section-6).
type frameType byte

const (
	frameData         frameType = 0x0
	frameHeaders      frameType = 0x1
	framePriority     frameType = 0x2
	frameRST          frameType = 0x3
	frameSettings     frameType = 0x4
	framePushPromise  frameType = 0x5
	framePing         frameType = 0x6
	frameGoAway       frameType = 0x7
	frameWindowUpdate frameType = 0x8
	frameContinuation frameType = 0x9
)

const (
	flagAck        = 0x1
	flagEndStream  = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

// settingID is a SETTINGS parameter (https://www.rfc-editor.org/rfc/rfc9113#section-6.5.2).
type settingID uint16

const (
	settingHeaderTableSize settingID = 0x1
	settingEnablePush      settingID = 0x2
	settingMaxStreams      settingID = 0x3
	settingInitialWindow   settingID = 0x4
	settingMaxFrame        settingID = 0x5
	settingMaxHeaderList   settingID = 0x6
	settingEnableConnect   settingID = 0x8 // RFC 8441
)

const (
	preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

	frameHeaderLen = 9
	// recordLen is the largest TLS plaintext (https://www.rfc-editor.org/rfc/rfc8446#section-5.1). Frames are cut so that
	// header and payload together fill whole records.
	recordLen = 16384
	// minMaxFrame is what every peer accepts before and without SETTINGS_MAX_FRAME_SIZE.
	minMaxFrame = 16384
	// ourMaxFrame is the reference's: peers may send us frames up to 1 MiB.
	ourMaxFrame = 1 << 20

	defaultWindow   = 65535 // https://www.rfc-editor.org/rfc/rfc9113#section-6.9.2
	maxWindow       = 1<<31 - 1
	maxStreamID     = 1<<31 - 1
	connWindow      = 16 << 20  // four times a stream's largest window, so that one stalled stream never stops the others
	baseWindow      = 64 << 10  // advertised: what a stream gets under memory pressure
	startWindow     = 256 << 10 // what a stream gets otherwise, by WINDOW_UPDATE when it opens
	scarceWindow    = 64 << 10  // what is asked for where the node's memory is limited and that is too much
	largestWindow   = 4 << 20
	clientMaxHeader = 16 << 10 // header list limits of the reference
	serverMaxHeader = 64 << 10
)

// frameHeader is a parsed frame header.
type frameHeader struct {
	length   int
	typ      frameType
	flags    byte
	streamID uint32
}

// parseFrameHeader reads the nine octets of https://www.rfc-editor.org/rfc/rfc9113#section-4.1.
func parseFrameHeader(b *[frameHeaderLen]byte) frameHeader {
	return frameHeader{
		length:   int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
		typ:      frameType(b[3]),
		flags:    b[4],
		streamID: binary.BigEndian.Uint32(b[5:]) & maxStreamID, // the reserved bit is ignored
	}
}

// putFrameHeader writes a frame header into the first nine bytes of b.
func putFrameHeader(b []byte, length int, typ frameType, flags byte, id uint32) {
	_ = b[8]
	b[0], b[1], b[2] = byte(length>>16), byte(length>>8), byte(length)
	b[3], b[4] = byte(typ), flags
	binary.BigEndian.PutUint32(b[5:], id)
}

func appendFrameHeader(b []byte, length int, typ frameType, flags byte, id uint32) []byte {
	var h [frameHeaderLen]byte
	putFrameHeader(h[:], length, typ, flags, id)
	return append(b, h[:]...)
}

func appendWindowUpdate(b []byte, id uint32, n int) []byte {
	b = appendFrameHeader(b, 4, frameWindowUpdate, 0, id)
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

func appendRST(b []byte, id uint32, code ErrCode) []byte {
	b = appendFrameHeader(b, 4, frameRST, 0, id)
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

func appendPing(b []byte, flags byte, data uint64) []byte {
	b = appendFrameHeader(b, 8, framePing, flags, 0)
	return binary.BigEndian.AppendUint64(b, data)
}

func appendGoAway(b []byte, last uint32, code ErrCode, debug string) []byte {
	b = appendFrameHeader(b, 8+len(debug), frameGoAway, 0, 0)
	b = binary.BigEndian.AppendUint32(b, last)
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	return append(b, debug...)
}

type setting struct {
	id  settingID
	val uint32
}

func appendSettings(b []byte, ss ...setting) []byte {
	b = appendFrameHeader(b, 6*len(ss), frameSettings, 0, 0)
	for _, s := range ss {
		b = binary.BigEndian.AppendUint16(b, uint16(s.id))
		b = binary.BigEndian.AppendUint32(b, s.val)
	}
	return b
}
