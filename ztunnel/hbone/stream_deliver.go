package hbone

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// DeliverTo writes everything that arrives to dst, by itself: the tunnel's reader writes what it has decrypted, and
// only while dst takes no more does a goroutine wait and go on. So a message costs no wake-up of somebody who carries
// it, and a stream that is idle no goroutine.
//
// n counts along. done is called once, when nothing more will be written: both errors are nil after END_STREAM and
// otherwise tell the two sides apart. It may be called by the tunnel's reader, and before DeliverTo returns: it must
// not wait. Deadlines for reading do not apply.
//
// It reports false, and does nothing, where dst cannot be written without waiting; RelayTo can.
func (s *Stream) DeliverTo(dst net.Conn, n *atomic.Uint64, done func(readErr, writeErr error)) bool {
	tcp, ok := sockopt.SocketOf(dst)
	if !ok {
		return false
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return false
	}
	o := &outlet{s: s, dst: tcp, raw: raw, n: n, done: done, busy: true}
	s.mu.Lock()
	s.out = o
	s.mu.Unlock()
	o.pump()
	return true
}

// outlet is where a stream's data goes by itself. Whoever makes it busy, and nobody else, takes data out of the stream,
// writes it, and looks for more before it lets go: so bytes keep their order, whoever carries them.
type outlet struct {
	s    *Stream
	dst  sockopt.Socket
	raw  syscall.RawConn
	n    *atomic.Uint64
	done func(readErr, writeErr error)
	busy bool // guarded by s.mu
	place
}

// claimLocked makes the stream's outlet busy. Who gets it pumps.
func (s *Stream) claimLocked() *outlet {
	o := s.out
	if o == nil || o.busy {
		return nil
	}
	o.busy = true
	return o
}

// kickLocked lets the outlet find out that reading has ended. Its caller may hold what done wants.
func (s *Stream) kickLocked() {
	if o := s.claimLocked(); o != nil {
		go o.pump()
	}
}

// pump writes what has come, without waiting, and leaves what dst does not take to a goroutine.
func (o *outlet) pump() {
	if p := o.run(parcels.Get().(*parcel), false); p != nil {
		go o.run(p, true)
	}
}

// run carries data until there is none, or it ends, or, unless it may wait, dst takes no more: then it returns what is
// left.
func (o *outlet) run(p *parcel, wait bool) (left *parcel) {
	p.o = o
	for {
		if p.lo < p.hi {
			err := o.write(p, wait)
			if err == nil && p.err != 0 {
				err = &net.OpError{Op: "write", Net: "tcp", Source: o.dst.LocalAddr(), Addr: o.dst.RemoteAddr(), Err: p.err}
			}
			if err != nil {
				o.end(p, nil, err)
				return nil
			}
			if p.lo < p.hi {
				p.account()
				return p
			}
		}
		more, err := o.next(p)
		switch {
		case err == io.EOF:
			o.end(p, nil, nil)
			return nil
		case err != nil:
			o.end(p, opError("read", o.s, err), nil)
			return nil
		case !more:
			p.recycle()
			return nil
		}
	}
}

// next accounts what was written and takes what has come meanwhile. Without an error and without more, the outlet is no
// longer busy.
func (o *outlet) next(p *parcel) (more bool, err error) {
	s := o.s
	s.mu.Lock()
	update := p.accountLocked()
	s.stalled = false
	switch {
	case s.closedRead:
		err = net.ErrClosed
	case s.buffered > 0:
		p.takeLocked(s)
		more = true
	case s.recvErr != nil:
		err = s.recvErr
	case s.eof:
		err = io.EOF
	default:
		o.busy = false
	}
	s.mu.Unlock()
	s.giveBack(update)
	return more, err
}

// end ends the outlet for ever.
func (o *outlet) end(p *parcel, readErr, writeErr error) {
	p.account()
	p.recycle()
	o.s.mu.Lock()
	o.s.out = nil
	o.s.mu.Unlock()
	o.done(readErr, writeErr)
}

// parcelPieces is how many pieces of received data one write takes: about what one read of the tunnel brings.
const parcelPieces = maxParts

// parcel is what is on its way from a stream to a socket. It is borrowed while there is something.
type parcel struct {
	o      *outlet
	pieces [parcelPieces]piece
	views  [parcelPieces][]byte
	lo, hi int // pieces[lo:hi] are still to be written
	gone   int // bytes written and not yet accounted
	err    syscall.Errno
	some   func(fd uintptr)      // write
	once   func(fd uintptr) bool // the same, and then false: wait for dst to take more
	calls  quick
}

var parcels = sync.Pool{New: func() any {
	p := new(parcel)
	p.some, p.once = p.write, p.writeOnce
	return p
}}

// takeLocked takes data out of the stream: where a write has to wait, nothing that happens to the stream meanwhile may
// touch what is being written.
func (p *parcel) takeLocked(s *Stream) {
	p.lo = 0
	size := 0
	for p.hi = 0; p.hi < parcelPieces && s.first < len(s.pieces); p.hi++ {
		pc := s.pieces[s.first]
		p.pieces[p.hi], p.views[p.hi] = pc, pc.blk.data[pc.lo:pc.hi]
		size += pc.hi - pc.lo
		s.dropFirstLocked()
	}
	s.buffered -= size
	s.owed += size // given back when written
	s.inFlight += size
}

// write writes what the socket takes.
func (p *parcel) write(fd uintptr) {
	p.err = 0
	for p.lo < p.hi {
		var n int
		var errno syscall.Errno
		if p.hi-p.lo == 1 {
			n, errno = p.calls.write(fd, p.views[p.lo])
		} else {
			n, errno = p.calls.writev(fd, p.views[p.lo:p.hi])
		}
		switch errno {
		case 0:
			p.wrote(n)
		case unix.EINTR:
		case unix.EAGAIN:
			return
		default:
			p.err = errno
			return
		}
	}
}

// writeOnce reports whether everything is written, or never will be. If not, its caller waits; what has been written by
// then counts.
func (p *parcel) writeOnce(fd uintptr) bool {
	if p.write(fd); p.lo < p.hi && p.err == 0 {
		p.account()
		return false
	}
	return true
}

func (p *parcel) wrote(n int) {
	p.o.n.Add(uint64(n))
	p.gone += n
	for n > 0 {
		v := &p.views[p.lo]
		if n < len(*v) {
			*v = (*v)[n:]
			return
		}
		n -= len(*v)
		p.pieces[p.lo].blk.release()
		p.pieces[p.lo], *v = piece{}, nil
		p.lo++
	}
}

// account gives window back for what was written.
func (p *parcel) account() {
	s := p.o.s
	s.mu.Lock()
	update := p.accountLocked()
	s.mu.Unlock()
	s.giveBack(update)
}

// accountLocked returns what to give back to the peer.
func (p *parcel) accountLocked() grant {
	if p.gone == 0 {
		return grant{}
	}
	s := p.o.s
	s.inFlight -= p.gone
	p.gone = 0
	return s.takenLocked(0)
}

// recycle lets go of everything.
func (p *parcel) recycle() {
	for ; p.lo < p.hi; p.lo++ {
		p.pieces[p.lo].blk.release()
		p.pieces[p.lo], p.views[p.lo] = piece{}, nil
	}
	p.o, p.err = nil, 0
	p.lo, p.hi, p.gone = 0, 0, 0
	p.calls.rested()
	parcels.Put(p)
}
