package hbone

import (
	"io"
	"net"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// relayPieces is how many pieces of received data one write takes.
const relayPieces = 16

// RelayTo writes everything that arrives to dst, straight from where it was decrypted, until the peer ends; n counts
// along. The errors of the two sides are kept apart; both are nil after END_STREAM.
func (s *Stream) RelayTo(dst io.Writer, n *atomic.Uint64) (readErr, writeErr error) {
	out := relayOut{s: s, dst: dst}
	for {
		size, err := out.take()
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return opError("read", s, err), nil
		}
		if err := out.write(); err != nil {
			out.release()
			return nil, err
		}
		out.release()
		n.Add(uint64(size))
		s.consumedBy(size)
	}
}

// relayOut is what is on its way from a stream to a writer.
type relayOut struct {
	s      *Stream
	dst    io.Writer
	pieces [relayPieces]piece
	views  [relayPieces][]byte
	bufs   net.Buffers
	k      int
}

// take waits for data and takes it out of the stream.
func (o *relayOut) take() (size int, err error) {
	s := o.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.awaitLocked(); err != nil {
		return 0, err
	}
	for o.k = 0; o.k < relayPieces && s.first < len(s.pieces); o.k++ {
		pc := s.pieces[s.first]
		o.pieces[o.k] = pc
		o.views[o.k] = pc.blk.data[pc.lo:pc.hi]
		size += pc.hi - pc.lo
		s.dropFirstLocked()
	}
	s.buffered -= size
	s.owed += size // given back when written; see consumedBy
	s.inFlight += size
	return size, nil
}

func (o *relayOut) write() error {
	if o.k == 1 {
		_, err := o.dst.Write(o.views[0])
		return err
	}
	o.bufs = o.views[:o.k]
	_, err := o.bufs.WriteTo(o.dst) // writev for sockets
	return err
}

func (o *relayOut) release() {
	for i := range o.k {
		o.pieces[i].blk.release()
		o.pieces[i], o.views[i] = piece{}, nil
	}
}

// consumedBy accounts n bytes that RelayTo has written.
func (s *Stream) consumedBy(n int) {
	s.mu.Lock()
	s.inFlight -= n
	update := s.takenLocked(0)
	s.mu.Unlock()
	s.giveBack(update)
}

// RelayFrom reads src to its end into the stream, straight behind the frame headers; n counts along. It does not end
// the stream. The errors of the two sides are kept apart; both are nil after src's EOF.
func (s *Stream) RelayFrom(src io.Reader, n *atomic.Uint64) (readErr, writeErr error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	in := relayIn{s: s, want: smallBlock - frameHeaderLen}
	sc, ok := src.(syscall.Conn)
	if _, socket := src.(net.Conn); ok && socket {
		if raw, err := sc.SyscallConn(); err == nil {
			return in.socket(raw, n)
		}
	}
	return in.reader(src, n)
}

// relayIn is what is on its way from a reader into a stream.
type relayIn struct {
	s        *Stream
	want     int // payload to ask for: a large block only while the source fills small ones
	reserved int
	frame    int
	blk      *block
	n        int
	err      error
	noWindow bool
	waited   bool // the source had nothing before this read
	iov      [largeBlock / recordLen][]byte
	calls    quick
	talk     talker
}

// socket waits for readability, and then takes window and block and reads: an idle stream holds neither.
func (in *relayIn) socket(raw syscall.RawConn, n *atomic.Uint64) (readErr, writeErr error) {
	once := in.once
	defer in.talk.close(raw)
	for {
		if in.talk.nap {
			in.calls.rested()
			in.talk.wait()
		}
		in.n, in.err, in.noWindow = 0, nil, false
		if err := raw.Read(once); err != nil {
			in.abandon()
			return err, nil
		}
		if in.noWindow {
			if err := in.reserve(); err != nil {
				return nil, err
			}
			continue
		}
		if in.talk.nap && in.n == 0 {
			continue
		}
		if in.err != nil || in.n == 0 {
			in.abandon()
			return in.err, nil
		}
		if err := in.send(); err != nil {
			return nil, err
		}
		n.Add(uint64(in.n))
	}
}

// once tries one read. It must not block: closing the socket waits for it.
func (in *relayIn) once(fd uintptr) bool {
	if in.reserved == 0 && !in.tryReserve() {
		in.noWindow = true
		return true
	}
	in.blk = getBlock(framedLen(in.reserved, in.frame))
	var errno syscall.Errno
	for {
		if in.reserved <= in.frame {
			in.n, errno = in.calls.read(fd, in.blk.data[frameHeaderLen:frameHeaderLen+in.reserved])
		} else {
			in.n, errno = in.calls.readv(fd, in.slots())
		}
		if errno != unix.EINTR {
			break
		}
	}
	if errno == 0 {
		if in.n > 0 {
			in.talk.note(fd, in.n, in.n == in.reserved, in.s.talking.Load())
		}
		return true
	}
	in.n = 0
	in.abandon()
	if errno == unix.EAGAIN {
		in.waited = true
		in.calls.rested()
		return in.talk.drained(fd, in.s.talking.Load())
	}
	in.err = errno
	return true
}

// slots are the payloads of consecutive frames in the block.
func (in *relayIn) slots() [][]byte {
	iov := in.iov[:0]
	for off, rest := frameHeaderLen, in.reserved; rest > 0; {
		k := min(rest, in.frame)
		iov = append(iov, in.blk.data[off:off+k])
		off += k + frameHeaderLen
		rest -= k
	}
	return iov
}

func (in *relayIn) tryReserve() bool {
	w := in.s.t.w
	w.mu.Lock()
	defer w.mu.Unlock()
	s := in.s
	if s.sendErrLocked() != nil || s.sendWindow <= 0 || w.window <= 0 || !w.admitsLocked(s, in.want) {
		return false // reserve says why
	}
	in.reserved, _ = w.reserveLocked(s, in.want)
	in.frame = w.frame
	return true
}

func (in *relayIn) reserve() (err error) {
	w := in.s.t.w
	w.mu.Lock()
	defer w.mu.Unlock()
	in.reserved, err = w.reserveLocked(in.s, in.want)
	in.frame = w.frame
	if err != nil {
		return opError("write", in.s, err)
	}
	return nil
}

// abandon gives back what a read did not need.
func (in *relayIn) abandon() {
	if in.blk != nil {
		in.blk.release()
		in.blk = nil
	}
	if in.reserved > 0 {
		w := in.s.t.w
		w.mu.Lock()
		w.giveBackLocked(in.s, in.reserved)
		w.mu.Unlock()
		in.reserved = 0
	}
}

// send frames and queues the n bytes that were read.
func (in *relayIn) send() error {
	s, w := in.s, in.s.t.w
	for off, rest := 0, in.n; rest > 0; {
		k := min(rest, in.frame)
		putFrameHeader(in.blk.data[off:], k, frameData, 0, s.id)
		off += k + frameHeaderLen
		rest -= k
	}
	if in.n == in.reserved {
		in.want = largeBlock // reserveLocked knows what of it is payload
	} else if in.n < smallBlock-frameHeaderLen && !in.talk.on {
		in.want = smallBlock - frameHeaderLen
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	unused, err := in.reserved-in.n, s.sendErrLocked()
	if err != nil {
		unused = in.reserved // the tunnel's other streams need it
	}
	if unused > 0 {
		w.giveBackLocked(s, unused)
	}
	in.reserved = 0
	if err != nil {
		in.blk.release()
		in.blk = nil
		return opError("write", s, err)
	}
	if size := framedLen(in.n, in.frame); in.n <= packLimit {
		w.packLocked(in.blk.data[:size])
		in.blk.release()
	} else {
		w.appendBlockLocked(in.blk, size)
	}
	in.blk = nil
	s.speak()
	if !in.waited && in.n < smallBlock/2 {
		w.attendLocked() // small pieces come faster than they leave: read on, so that they leave together
	} else {
		s.flushSmallLocked(in.n)
	}
	in.waited = false
	s.t.noteMoved(in.n)
	return nil
}

// reader serves sources that cannot be waited for: it holds a small block meanwhile, but no window.
func (in *relayIn) reader(src io.Reader, n *atomic.Uint64) (readErr, writeErr error) {
	blk := getBlock(smallBlock)
	defer blk.release()
	for {
		k, err := src.Read(blk.data)
		if k > 0 {
			if _, werr := in.s.writeLocked(blk.data[:k]); werr != nil {
				return nil, werr
			}
			n.Add(uint64(k))
		}
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return err, nil
		}
	}
}
