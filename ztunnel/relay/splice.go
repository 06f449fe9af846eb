package relay

import (
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// pipeSize is what a pipe may hold: one splice(2) moves at most that.
const pipeSize = 256 << 10

// pipe is a kernel buffer between two sockets.
type pipe struct{ r, w int }

// pipePool keeps idle pipes, always empty; surplus ones are closed.
type pipePool struct {
	mu   sync.Mutex
	idle []pipe // guarded by mu
}

// maxIdlePipes bounds the descriptors that are kept for the next copy.
const maxIdlePipes = 32

var pipes pipePool

func (pp *pipePool) get() (pipe, error) {
	pp.mu.Lock()
	if k := len(pp.idle); k > 0 {
		p := pp.idle[k-1]
		pp.idle = pp.idle[:k-1]
		pp.mu.Unlock()
		return p, nil
	}
	pp.mu.Unlock()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return pipe{}, os.NewSyscallError("pipe2", err)
	}
	_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize) // smaller is slower, not wrong
	return pipe{fds[0], fds[1]}, nil
}

func (pp *pipePool) put(p pipe) {
	pp.mu.Lock()
	defer pp.mu.Unlock()
	if len(pp.idle) < maxIdlePipes {
		pp.idle = append(pp.idle, p)
		return
	}
	p.close()
}

func (p pipe) close() {
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
}

// spliceFlags: pages are moved where possible, and nothing blocks in the kernel; waiting is the runtime's.
const spliceFlags = unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK

// splicer moves bytes between two sockets inside the kernel, splice(2).
//
// Invariant: between fill and drain the pipe holds exactly size bytes; without bytes there is no pipe, so an idle
// direction holds no descriptor besides its socket.
type splicer struct {
	pipe pipe
	held bool
	size int
	err  error
	eof  bool
}

func spliceConn(src, dst sockopt.Socket, n *atomic.Uint64) (readErr, writeErr error) {
	in, err := src.SyscallConn()
	if err != nil {
		return err, nil
	}
	out, err := dst.SyscallConn()
	if err != nil {
		return nil, err
	}
	var s splicer
	defer s.release()
	fill, drain := s.fill, s.drain
	for {
		if err := in.Read(fill); err != nil {
			return err, nil
		}
		if s.err != nil || s.eof {
			return s.err, nil
		}
		size := s.size
		if err := out.Write(drain); err != nil {
			return nil, err
		}
		if s.err != nil {
			return nil, s.err
		}
		n.Add(uint64(size))
	}
}

// fill moves what the socket has into the pipe; false makes the caller wait for readability.
func (s *splicer) fill(fd uintptr) bool {
	if !s.held {
		if s.pipe, s.err = pipes.get(); s.err != nil {
			return true
		}
		s.held = true
	}
	n, err := splice(int(fd), s.pipe.w, pipeSize)
	if err == unix.EAGAIN {
		s.release()
		return false
	}
	s.size, s.eof = n, n == 0 && err == nil
	s.err = os.NewSyscallError("splice", err)
	return true
}

// drain empties the pipe into the socket; false makes the caller wait for writability.
func (s *splicer) drain(fd uintptr) bool {
	for s.size > 0 {
		n, err := splice(s.pipe.r, int(fd), s.size)
		if err == unix.EAGAIN {
			return false
		}
		if err != nil {
			s.err = os.NewSyscallError("splice", err)
			return true
		}
		s.size -= n
	}
	return true
}

// release puts an empty pipe back and closes one whose bytes nobody will take.
func (s *splicer) release() {
	if !s.held {
		return
	}
	s.held = false
	if s.size > 0 {
		s.pipe.close()
		return
	}
	pipes.put(s.pipe)
}

func splice(from, to, n int) (int, error) {
	for {
		k, err := unix.Splice(from, nil, to, nil, n, spliceFlags)
		if err != unix.EINTR {
			return int(k), err
		}
	}
}
