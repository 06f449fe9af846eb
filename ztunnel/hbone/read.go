package hbone

import (
	"encoding/binary"
	"fmt"
	"io"
)

const (
	// borrowLimit: smaller payloads are copied into a block of their stream's, so that a byte never pins a whole block.
	borrowLimit = 4 << 10
	// maxControlPayload bounds frames that have to be whole before they mean anything, except header blocks.
	maxControlPayload = 6 * 128
	// maxGoAwayDebug is how much of a GOAWAY's text is kept.
	maxGoAwayDebug = 256
	// floodLimit is how many frames that move nothing may come between two that do.
	floodLimit = 10000
	// resetLimit is how many requests more a peer may reset before their answer than it lets be answered
	// (CVE-2023-44487).
	resetLimit = 400
)

// reader is the inbound half of a tunnel. All of it belongs to the reader goroutine.
type reader struct {
	t *tunnel

	sawPreface int // bytes of the client's preface seen, on servers
	gotFirst   bool
	held       bool // SETTINGS or an answer to them are queued, and nobody sends them yet

	head    [frameHeaderLen]byte
	headLen int
	fh      frameHeader
	inFrame bool
	left    int    // payload still to come
	payload []byte // of a frame that has to be whole
	keep    int    // bytes of payload to keep; the rest is skipped

	// DATA under way
	data    *Stream // nil: discard
	padLen  int     // -1: the pad length octet is still to come
	dataLen int     // payload without padding still to come

	// header block under way (https://www.rfc-editor.org/rfc/rfc9113#section-6.10)
	block       []byte
	blockID     uint32
	blockFlags  byte
	inBlock     bool
	blockFrames int
	headers     *headDecoder
	maxHeader   int

	connWindow int // what the peer may still send
	connCredit int // what we owe the peer
	floods     int
	resets     int

	wake []*Stream // have data, and are told when the transport has nothing more at hand
	blk  *block    // what is being handled lies in it; lent by rc
}

func (r *reader) init(t *tunnel) {
	r.t = t
	r.connWindow = defaultWindow
}

// widen appends to b what raises the connection's window to what the tunnel is to have.
func (r *reader) widen(b []byte) []byte {
	more := r.t.windows.Connection - defaultWindow
	if more <= 0 {
		return b
	}
	r.connWindow += more
	return appendWindowUpdate(b, 0, more)
}

func (r *reader) configure(maxHeader int) {
	r.maxHeader = maxHeader
	r.headers = newHeadDecoder(maxHeader)
}

// loop reads and handles frames until the tunnel ends.
func (r *reader) loop() error {
	for {
		if !r.t.rc.Buffered() {
			r.wakeStreams()
			r.blk = nil
			if r.held {
				r.held = false
				r.t.w.flushHeld()
			}
			if err := r.t.rc.Fill(); err != nil { // an idle tunnel holds no block
				return r.transportError(err)
			}
			if r.t.client {
				r.t.heardAt.Store(r.t.clock().UnixNano())
			}
		}
		p, blk, err := r.t.rc.Next()
		if len(p) > 0 {
			r.t.received.Add(uint64(len(p)))
			r.blk = blk
			if err := r.handle(p); err != nil {
				r.wakeStreams()
				return err
			}
		}
		if err != nil {
			r.wakeStreams()
			return r.transportError(err)
		}
	}
}

// transportError keeps io.EOF for an end between frames, which fail takes for an orderly one if no stream is cut short.
// With or without close_notify: END_STREAM is what says that a stream is complete.
func (r *reader) transportError(err error) error {
	ended := err == io.EOF || err == errCutOff
	if ended && !r.inFrame && r.headLen == 0 {
		return io.EOF
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return &lostError{err}
}

func (r *reader) wakeStreams() {
	for i, s := range r.wake {
		s.wakeReader()
		r.wake[i] = nil
	}
	r.wake = r.wake[:0]
}

// handle consumes plaintext, which may begin and end anywhere in a frame. p lies in r.blk.
func (r *reader) handle(p []byte) error {
	for len(p) > 0 {
		var err error
		switch {
		case !r.t.client && r.sawPreface < len(preface):
			p, err = r.eatPreface(p)
		case !r.inFrame:
			n := copy(r.head[r.headLen:], p)
			r.headLen += n
			p = p[n:]
			if r.headLen == frameHeaderLen {
				r.headLen = 0
				err = r.beginFrame(parseFrameHeader(&r.head))
			}
		case r.fh.typ == frameData:
			p, err = r.eatData(p)
		default:
			p, err = r.eatPayload(p)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *reader) eatPreface(p []byte) ([]byte, error) {
	n := min(len(p), len(preface)-r.sawPreface)
	if string(p[:n]) != preface[r.sawPreface:r.sawPreface+n] {
		return nil, connFault(CodeProtocol, "not an HTTP/2 client preface")
	}
	r.sawPreface += n
	return p[n:], nil
}

// beginFrame checks what can be checked before the payload, so that no frame makes us wait or store for nothing.
func (r *reader) beginFrame(h frameHeader) error {
	r.fh, r.inFrame, r.left, r.payload = h, true, h.length, r.payload[:0]
	if !r.gotFirst && (h.typ != frameSettings || h.flags&flagAck != 0) {
		return connFault(CodeProtocol, "first frame is not SETTINGS")
	}
	if h.length > r.t.windows.Frame {
		return connFault(CodeFrameSize, fmt.Sprintf("frame of %d bytes", h.length))
	}
	if r.inBlock && (h.typ != frameContinuation || h.streamID != r.blockID) {
		return connFault(CodeProtocol, "header block interrupted")
	}
	if err := r.beginKind(h); err != nil {
		return err
	}
	if r.left == 0 {
		return r.endFrame()
	}
	return nil
}

// beginKind decides per frame type what to keep of the payload.
func (r *reader) beginKind(h frameHeader) error {
	onStream := h.streamID != 0
	size := func(want int) error {
		r.keep = want
		if h.length != want {
			return connFault(CodeFrameSize, fmt.Sprintf("frame type %d of %d bytes", h.typ, h.length))
		}
		return nil
	}
	wantStream := func(want bool) error {
		if onStream != want {
			return connFault(CodeProtocol, fmt.Sprintf("frame type %d on stream %d", h.typ, h.streamID))
		}
		return nil
	}
	switch h.typ {
	case frameData:
		if err := wantStream(true); err != nil {
			return err
		}
		return r.beginData(h)
	case frameHeaders, frameContinuation:
		if err := wantStream(true); err != nil {
			return err
		}
		if h.typ == frameContinuation && !r.inBlock {
			return connFault(CodeProtocol, "CONTINUATION without HEADERS")
		}
		r.keep = h.length
		// Huffman codes are at least five bits, so this is the most that a permitted list can take, with its padding.
		if len(r.block)+h.length > 2*r.maxHeader || r.blockFrames > 64 {
			return connFault(CodeCalm, "header block too large")
		}
		return nil
	case frameRST:
		if err := wantStream(true); err != nil {
			return err
		}
		return size(4)
	case frameSettings:
		if err := wantStream(false); err != nil {
			return err
		}
		if h.flags&flagAck != 0 {
			return size(0)
		}
		if h.length%6 != 0 {
			return connFault(CodeFrameSize, "SETTINGS")
		}
		if h.length > maxControlPayload {
			return connFault(CodeCalm, "SETTINGS too large")
		}
		r.keep = h.length
		return nil
	case framePushPromise:
		return connFault(CodeProtocol, "PUSH_PROMISE")
	case framePing:
		if err := wantStream(false); err != nil {
			return err
		}
		return size(8)
	case frameGoAway:
		if h.length < 8 {
			return size(8)
		}
		r.keep = min(h.length, 8+maxGoAwayDebug)
		return wantStream(false)
	case frameWindowUpdate:
		return size(4)
	default: // PRIORITY and unknown types mean nothing to us
		r.keep = 0
		return r.flood()
	}
}

// eatPayload collects the part of the payload that is kept.
func (r *reader) eatPayload(p []byte) ([]byte, error) {
	n := min(len(p), r.left)
	if k := min(n, r.keep-len(r.payload)); k > 0 {
		r.payload = append(r.payload, p[:k]...)
	}
	r.left -= n
	if r.left == 0 {
		return p[n:], r.endFrame()
	}
	return p[n:], nil
}

func (r *reader) endFrame() error {
	r.inFrame = false
	h, p := r.fh, r.payload
	switch h.typ {
	case frameData:
		return r.endData(h)
	case frameHeaders:
		return r.onHeaders(h, p)
	case frameContinuation:
		return r.onContinuation(h, p)
	case frameRST:
		return r.onRST(h.streamID, ErrCode(binary.BigEndian.Uint32(p)))
	case frameSettings:
		return r.onSettings(h, p)
	case framePing:
		return r.onPing(h, binary.BigEndian.Uint64(p))
	case frameGoAway:
		return r.onGoAway(binary.BigEndian.Uint32(p)&maxStreamID, ErrCode(binary.BigEndian.Uint32(p[4:])), string(p[8:]))
	case frameWindowUpdate:
		return r.onWindowUpdate(h.streamID, binary.BigEndian.Uint32(p)&maxWindow)
	}
	return nil
}

// flood counts a frame that moves nothing.
func (r *reader) flood() error {
	if r.floods++; r.floods > floodLimit {
		return connFault(CodeCalm, "too many frames without data")
	}
	return nil
}

var errNotRead = connFault(CodeCalm, "peer sends and does not read")

// control queues an answer of ours.
func (r *reader) control(frame []byte) error {
	if !r.t.w.sendControl(frame) {
		return errNotRead
	}
	return nil
}

// known reports whether a stream id has been used; frames on idle streams are a connection error
// (https://www.rfc-editor.org/rfc/rfc9113#section-5.1).
func (r *reader) known(id uint32) bool {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	if r.t.client {
		return id%2 == 1 && id < r.t.nextID
	}
	return id%2 == 1 && id <= max(r.t.highID, r.t.refusedID)
}
