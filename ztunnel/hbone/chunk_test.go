package hbone

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/ambit-mesh/ambit/test/memnet"
)

// looseRecords is a record layer that sends nowhere and never reads.
type looseRecords struct{ sent int }

func (l *looseRecords) Fill() error                   { return io.EOF }
func (l *looseRecords) Buffered() bool                { return false }
func (l *looseRecords) Next() ([]byte, *block, error) { return nil, nil, io.EOF }
func (l *looseRecords) Close() error                  { return nil }
func (l *looseRecords) Cut() error                    { return nil }
func (l *looseRecords) CanTry() bool                  { return true }
func (l *looseRecords) Flush() error                  { return nil }
func (l *looseRecords) TryBatch(parts []segment) (bool, error) {
	return false, l.WriteBatch(parts)
}
func (l *looseRecords) WriteBatch(parts []segment) error {
	for _, p := range parts {
		l.sent += p.n
	}
	return nil
}

func looseTunnel() (*tunnel, *looseRecords) {
	c, _ := memnet.Pipe()
	rc := &looseRecords{}
	t := newTunnel(rc, c, nil, Windows{})
	t.in.configure(serverMaxHeader)
	return t, rc
}

// DATA frames and their headers fill whole records, and never exceed what the peer takes.
func TestFramesFillRecords(t *testing.T) {
	for _, tt := range []struct{ limit, payload int }{
		{16384, 16375}, {16385, 16375}, {32758, 16375}, {32759, 32759}, {1 << 20, 131063}, {1<<24 - 1, 131063},
	} {
		w := newWriter(nil, nil)
		w.setMaxFrameLocked(tt.limit)
		if w.frame != tt.payload {
			t.Errorf("peer takes %d: payload %d, want %d", tt.limit, w.frame, tt.payload)
		}
		if (w.frame+frameHeaderLen)%recordLen != 0 || w.frame > tt.limit {
			t.Errorf("peer takes %d: payload %d does not fit", tt.limit, w.frame)
		}
	}
}

// A stream that writes much goes to the end of the line after each block; small writes do not wait in it.
func TestWritersTakeTurns(t *testing.T) {
	tun, _ := looseTunnel()
	w := tun.w
	a, b := tun.newStream(1), tun.newStream(3)
	for _, s := range []*Stream{a, b} {
		s.sendWindow = 1 << 30
	}
	w.window = 1 << 30
	w.mu.Lock()
	defer w.mu.Unlock()
	w.queued = queueLimit
	w.waiters.push(a)
	w.waiters.push(b)
	if w.admitsLocked(a, 1<<20) {
		t.Error("a full queue admits bulk")
	}
	if !w.admitsLocked(b, smallWrite) {
		t.Error("a full queue refuses a small write")
	}
	w.queued = 0
	if w.admitsLocked(b, 1<<20) {
		t.Error("b overtakes a")
	}
	n, err := w.reserveLocked(a, 1<<20)
	if err != nil || n > largeBlock {
		t.Errorf("turn of %d bytes, %v: want at most a block", n, err)
	}
	if w.waiters.front() != b {
		t.Error("a did not leave the line")
	}
}

func FuzzReader(f *testing.F) {
	hdr := func(n int, typ frameType, flags byte, id uint32, p ...byte) []byte {
		return append(appendFrameHeader(nil, n, typ, flags, id), p...)
	}
	hello := append([]byte(preface), appendSettings(nil, setting{settingInitialWindow, 70000}, setting{settingMaxFrame, 1 << 20})...)
	connect := appendIndexedName(appendIndexedName(nil, staticMethod, "CONNECT"), staticAuthority, "a:1")
	open := slices.Concat(hello, hdr(len(connect), frameHeaders, flagEndHeaders, 1, connect...))
	for _, seed := range [][]byte{
		hello, open,
		slices.Concat(open, hdr(3, frameData, 0, 1, 'a', 'b', 'c'), hdr(4, frameData, flagPadded|flagEndStream, 1, 2, 'x', 0, 0)),
		slices.Concat(open, appendRST(nil, 1, CodeCancel), appendPing(nil, 0, 1), appendWindowUpdate(nil, 0, 5), appendGoAway(nil, 0, CodeNo, "bye")),
		slices.Concat(hello, hdr(2, frameHeaders, 0, 1, 0x20, 0x82), hdr(0, frameContinuation, flagEndHeaders, 1)),
		slices.Concat(open, hdr(1, frameData, flagPadded, 1, 0), hdr(0, frameData, flagEndStream, 1)),
	} {
		f.Add(seed, uint8(7))
	}
	f.Fuzz(func(t *testing.T, data []byte, cut uint8) {
		tun, _ := looseTunnel()
		var handled atomic.Int64
		srv := NewServer(ServerConfig{Handler: func(_ context.Context, r *Request) {
			handled.Add(1)
			if s, err := r.Accept(); err == nil {
				_, _ = io.Copy(io.Discard, struct{ io.Reader }{s})
				_ = s.Close()
			}
		}})
		tun.server, tun.ctx = srv, t.Context()
		in := &tun.in
		step := int(cut)%97 + 1
		var err error
		for len(data) > 0 && err == nil { // pieces of any size mean the same
			in.blk = getBlock(smallBlock)
			n := copy(in.blk.data[:step], data)
			err = in.handle(in.blk.data[:n])
			in.wakeStreams()
			in.blk.release()
			data = data[n:]
		}
		if cap(in.payload) > 2*serverMaxHeader+smallBlock || cap(in.block) > 4*serverMaxHeader {
			t.Errorf("reader keeps %d and %d bytes", cap(in.payload), cap(in.block))
		}
		tun.fail(net.ErrClosed)
		srv.wg.Wait()
	})
}

func FuzzHeadDecode(f *testing.F) {
	f.Add(appendIndexedName(appendIndexedName(nil, staticMethod, "CONNECT"), staticAuthority, "a:1"))
	f.Add(appendField(appendStatus(appendTableSizeZero(nil), 503), "x", "y"))
	f.Add(binary.AppendUvarint([]byte{0x3f}, 1<<40))
	f.Fuzz(func(t *testing.T, block []byte) {
		h, err := newHeadDecoder(clientMaxHeader).decode(block)
		if err != nil || h.tooLarge || h.malformed != nil {
			return
		}
		size := 0
		for _, f := range h.fields {
			size += len(f.Name) + len(f.Value) + 32
			if !validName(f.Name) || !validValue(f.Value) {
				t.Errorf("invalid header passed: %q: %q", f.Name, f.Value)
			}
		}
		if size > clientMaxHeader {
			t.Errorf("list of %d bytes passed", size)
		}
		var b []byte
		for _, f := range h.fields {
			b = appendField(b, f.Name, f.Value)
		}
		again, err := newHeadDecoder(clientMaxHeader).decode(b)
		if err != nil || !slices.Equal(again.fields, h.fields) {
			t.Errorf("round trip: %v, %v: want %v", again, err, h.fields)
		}
	})
}
