package hbone

import (
	"encoding/binary"
	"fmt"
	"syscall"
)

func (r *reader) onSettings(h frameHeader, p []byte) error {
	if h.flags&flagAck != 0 {
		r.t.sampleRTT()
		if !r.t.acknowledged.Swap(true) && r.t.scarce {
			return r.control(r.widen(nil))
		}
		return nil
	}
	if err := r.flood(); err != nil {
		return err
	}
	for ; len(p) > 0; p = p[6:] {
		if err := r.applySetting(settingID(binary.BigEndian.Uint16(p)), binary.BigEndian.Uint32(p[2:])); err != nil {
			return err
		}
	}
	if !r.gotFirst {
		r.gotFirst = true
		r.t.firstSettings()
	}
	if !r.t.w.holdControl(appendFrameHeader(nil, 0, frameSettings, flagAck, 0)) {
		return errNotRead
	}
	r.held = true
	return nil
}

func (r *reader) applySetting(id settingID, v uint32) error {
	switch t := r.t; id {
	case settingMaxStreams:
		t.mu.Lock()
		t.maxStreams = int(min(v, maxWindow))
		t.mu.Unlock()
	case settingInitialWindow:
		if v > maxWindow {
			return connFault(CodeFlowControl, "SETTINGS_INITIAL_WINDOW_SIZE")
		}
		return r.applyInitialWindow(int64(v))
	case settingMaxFrame:
		if v < minMaxFrame || v > 1<<24-1 {
			return connFault(CodeProtocol, "SETTINGS_MAX_FRAME_SIZE")
		}
		t.w.mu.Lock()
		t.w.setMaxFrameLocked(int(v))
		t.w.mu.Unlock()
	case settingEnablePush, settingEnableConnect:
		if v > 1 || id == settingEnablePush && v == 1 && t.client {
			return connFault(CodeProtocol, fmt.Sprintf("SETTINGS %#x=%d", id, v))
		}
	}
	return nil // header table: we never index; header list: ours are small; the rest is unknown and ignored
}

// applyInitialWindow moves the windows of all open streams by the difference; they may become negative
// (https://www.rfc-editor.org/rfc/rfc9113#section-6.9.2).
func (r *reader) applyInitialWindow(v int64) error {
	t := r.t
	t.mu.Lock()
	defer t.mu.Unlock()
	t.w.mu.Lock()
	defer t.w.mu.Unlock()
	delta := v - t.w.initialWindow
	t.w.initialWindow = v
	for _, s := range t.streams {
		if s.sendWindow += delta; s.sendWindow > maxWindow {
			return connFault(CodeFlowControl, "stream window over 2^31-1")
		}
		s.sendCond.Signal()
	}
	return nil
}

func (r *reader) onPing(h frameHeader, data uint64) error {
	if h.flags&flagAck == 0 {
		if err := r.flood(); err != nil {
			return err
		}
		return r.control(appendPing(nil, flagAck, data))
	}
	switch data {
	case lifePing:
		r.t.sampleRTT()
	case drainPing:
		r.t.drainAnswered()
	}
	return nil
}

func (r *reader) onGoAway(last uint32, code ErrCode, debug string) error {
	if !r.t.client {
		last = maxStreamID // the client speaks of pushes
	}
	r.t.goneAway(last, code, debug)
	return nil
}

func (r *reader) onWindowUpdate(id, n uint32) error {
	t := r.t
	if id == 0 {
		if n == 0 {
			return connFault(CodeProtocol, "WINDOW_UPDATE of 0")
		}
		t.w.mu.Lock()
		defer t.w.mu.Unlock()
		if t.w.window += int64(n); t.w.window > maxWindow {
			return connFault(CodeFlowControl, "connection window over 2^31-1")
		}
		t.w.wakeLocked()
		return nil
	}
	s := t.stream(id)
	if s == nil {
		if !r.known(id) {
			return connFault(CodeProtocol, fmt.Sprintf("WINDOW_UPDATE on idle stream %d", id))
		}
		return r.flood()
	}
	if n == 0 {
		s.abort(CodeProtocol)
		return r.flood()
	}
	t.w.mu.Lock()
	s.sendWindow += int64(n)
	over := s.sendWindow > maxWindow
	s.sendCond.Signal()
	t.w.mu.Unlock()
	if over {
		s.abort(CodeFlowControl)
	}
	return nil
}

func (r *reader) onRST(id uint32, code ErrCode) error {
	s := r.t.stream(id)
	if s == nil {
		if !r.known(id) {
			return connFault(CodeProtocol, fmt.Sprintf("RST_STREAM on idle stream %d", id))
		}
		return r.flood()
	}
	if !r.t.client && !s.answered.Load() {
		if r.resets++; r.resets > resetLimit {
			return connFault(CodeCalm, "too many requests reset before their answer")
		}
	}
	s.resetByPeer(code)
	return nil
}

// resetErrors is what reading and writing return after the peer's RST_STREAM. A foreign ztunnel ends streams that it
// drops with CANCEL: to a reader that is an end, to a writer a closed pipe.
func resetErrors(code ErrCode) (read, write error) {
	switch code {
	case CodeNo, CodeCancel:
		return nil, syscall.EPIPE
	case CodeStreamClosed:
		return &ResetError{code, true}, syscall.EPIPE
	}
	err := &ResetError{code, true}
	return err, err
}

// onHeaders begins a header block.
func (r *reader) onHeaders(h frameHeader, p []byte) error {
	if h.flags&flagPadded != 0 {
		if len(p) == 0 || int(p[0]) > len(p)-1 {
			return connFault(CodeProtocol, "padding longer than HEADERS")
		}
		p = p[1 : len(p)-int(p[0])]
	}
	if h.flags&flagPriority != 0 {
		if len(p) < 5 {
			return connFault(CodeFrameSize, "HEADERS too short for its priority")
		}
		p = p[5:]
	}
	r.block, r.blockID, r.blockFlags = append(r.block[:0], p...), h.streamID, h.flags
	r.inBlock, r.blockFrames = true, 1
	if h.flags&flagEndHeaders != 0 {
		return r.endBlock()
	}
	return nil
}

func (r *reader) onContinuation(h frameHeader, p []byte) error {
	r.block = append(r.block, p...)
	r.blockFrames++
	if h.flags&flagEndHeaders != 0 {
		return r.endBlock()
	}
	return nil
}

func (r *reader) endBlock() error {
	r.inBlock = false
	hd, err := r.headers.decode(r.block)
	if cap(r.block) > smallBlock {
		r.block = nil
	}
	if err != nil {
		return connFault(CodeCompression, err.Error())
	}
	end := r.blockFlags&flagEndStream != 0
	if s := r.t.stream(r.blockID); s != nil {
		return r.moreHeaders(s, hd, end)
	}
	if r.t.client {
		if !r.known(r.blockID) {
			return connFault(CodeProtocol, fmt.Sprintf("HEADERS on idle stream %d", r.blockID))
		}
		return r.flood() // a stream that we have reset
	}
	return r.newRequest(r.blockID, hd, end)
}

// moreHeaders is an answer to a client, or trailers to either.
func (r *reader) moreHeaders(s *Stream, hd *head, end bool) error {
	switch {
	case r.t.client && !s.answered.Load():
		if hd.malformed != nil || hd.status == 0 && !hd.tooLarge {
			s.abort(CodeProtocol)
			return nil
		}
		if hd.status < 200 && !hd.tooLarge && !end {
			return r.flood() // interim
		}
		s.answer(hd, end)
	case end:
		s.endOfStream() // trailers of a tunnel mean nothing
	default:
		s.abort(CodeProtocol)
	}
	return nil
}
