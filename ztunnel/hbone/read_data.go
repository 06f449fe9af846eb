package hbone

import "fmt"

// beginData takes a DATA frame's length from both windows at once, padding included
// (https://www.rfc-editor.org/rfc/rfc9113#section-6.9.1).
func (r *reader) beginData(h frameHeader) error {
	if r.connWindow -= h.length; r.connWindow < 0 {
		return connFault(CodeFlowControl, "connection window exceeded")
	}
	s := r.t.stream(h.streamID)
	if s == nil && !r.known(h.streamID) {
		return connFault(CodeProtocol, fmt.Sprintf("DATA on idle stream %d", h.streamID))
	}
	r.dataLen, r.padLen = h.length, 0
	if h.flags&flagPadded != 0 {
		if h.length == 0 {
			return connFault(CodeFrameSize, "padded DATA without pad length")
		}
		r.padLen = -1
	}
	r.data = s
	if s != nil {
		if code := s.beginData(h.length, r.t.overdraft()); code != CodeNo {
			s.abort(code)
			r.data = nil
		}
	}
	if h.length > 0 && r.data != nil {
		r.floods = 0
	} else if h.flags&flagEndStream == 0 {
		return r.flood()
	}
	return nil
}

// eatData hands payload to the stream as it comes; a frame is never collected.
func (r *reader) eatData(p []byte) ([]byte, error) {
	if r.padLen < 0 {
		r.padLen = int(p[0])
		p = p[1:]
		r.left--
		r.dataLen--
		if r.dataLen -= r.padLen; r.dataLen < 0 {
			return nil, connFault(CodeProtocol, "padding longer than DATA")
		}
		if r.data != nil {
			r.data.consumed(1 + r.padLen) // the application never sees it
		}
		r.credit(1 + r.padLen)
		if r.left == 0 {
			return p, r.endFrame()
		}
	}
	n := min(len(p), r.dataLen)
	if n > 0 {
		if r.data != nil && r.data.deliver(r.blk, p[:n]) {
			r.wake = append(r.wake, r.data)
		}
		r.t.noteMoved(n)
		r.credit(n)
		r.dataLen -= n
		r.left -= n
		p = p[n:]
	}
	if pad := min(len(p), r.left); r.dataLen == 0 && pad > 0 {
		r.left -= pad
		p = p[pad:]
	}
	if r.left == 0 {
		return p, r.endFrame()
	}
	return p, nil
}

// credit returns connection window as soon as data has arrived: a stream that is not read holds back itself only.
func (r *reader) credit(n int) {
	r.connCredit += n
	if r.connCredit < r.t.windows.Connection/4 {
		return
	}
	r.connWindow += r.connCredit
	_ = r.control(appendWindowUpdate(nil, 0, r.connCredit)) // four in a window: never many
	r.connCredit = 0
}

func (r *reader) endData(h frameHeader) error {
	if s := r.data; s != nil && h.flags&flagEndStream != 0 {
		s.endOfStream()
	}
	r.data = nil
	return nil
}
