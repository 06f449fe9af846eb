package hbone

import (
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An application that writes much in small pieces and is read as soon as each of them is there pays for each with the
// whole way of a segment and its acknowledgement: 4 µs per KiB here, where a write that only joins the queue behind a
// closed window takes 1 µs. It is slow for that, we are idle, and so it stays. The less eager we are the quicker it is:
// such a stream is read by the clock. What it has written by then arrives with few large segments.
//
// Latency: a piece waits for talkNap at most, and so does the end of the stream. Only who has sent talkReads pieces at
// talkRate without an answer is read like that. It ends with the first answer, as soon as less comes, and in any case
// after talkTerm: who is read by the clock does not show how large its writes are.
const (
	smallPiece = 8 << 10
	talkReads  = 512      // reads that are looked at before it begins; three quarters of them small
	talkRate   = 48 << 20 // bytes per second that they bring at least
	talkNap    = 500 * time.Microsecond
	talkLump   = int(talkRate * int64(talkNap) / int64(time.Second)) // what a nap brings at least
	talkTerm   = 250 * time.Millisecond
	// talkLowat keeps the poller asleep meanwhile (SO_RCVLOWAT, socket(7)): it would be woken by each piece otherwise,
	// whether anybody waits or not.
	talkLowat = 64 << 10
	// patience bounds how many reads are looked at where it ended early, twice as many each time.
	patience = 64 * talkReads
	// maxTalkers bounds the clocks, which are descriptors.
	maxTalkers = 64
)

var talkers atomic.Int32 // that have a clock

// talker decides when a stream's source is read. The goroutine that reads owns it. The zero value is ready.
//
// Invariant: whoever waits for the socket to be readable has ended it before, so that nothing lies there unseen.
type talker struct {
	need                int // reads to look at
	reads, small, bytes int // of which that many were looked at
	since               time.Time
	on                  bool
	nap                 bool // the next read is the clock's
	lump                int  // read since it rang
	clock               *clock
	time                func() time.Time // nil: time.Now
}

func (t *talker) now() time.Time {
	if t.time != nil {
		return t.time()
	}
	return time.Now()
}

// note is told of each read: full says that there may be more, oneWay that no answer has come.
func (t *talker) note(fd uintptr, n int, full, oneWay bool) {
	if t.on {
		if t.lump += n; !full {
			t.drained(fd, oneWay)
		}
		return
	}
	if !oneWay {
		t.reads = 0
		return
	}
	if t.reads == 0 {
		t.small, t.bytes, t.since = 0, 0, t.now()
	}
	t.reads++
	t.bytes += n
	if n < smallPiece {
		t.small++
	}
	if t.reads < max(t.need, talkReads) {
		return
	}
	if 4*t.small >= 3*t.reads && time.Duration(t.bytes)*time.Second/talkRate >= t.now().Sub(t.since) {
		t.begin(fd)
	}
	t.reads = 0
}

// drained is told that the socket has no more for now. It reports whether to nap; if not, to wait for the socket.
func (t *talker) drained(fd uintptr, oneWay bool) bool {
	if !t.on {
		return false
	}
	lump, over := t.lump, t.now().Sub(t.since) >= talkTerm
	t.lump = 0
	if t.nap = oneWay && lump >= talkLump && !over; t.nap {
		return true
	}
	t.end(fd)
	if t.need = min(2*max(t.need, talkReads), patience); over {
		t.need = 0
	}
	return false
}

func (t *talker) begin(fd uintptr) {
	if t.clock == nil {
		if t.clock = newClock(); t.clock == nil {
			t.need = patience
			return
		}
	}
	if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, talkLowat) == nil {
		t.on, t.nap, t.lump, t.since = true, true, 0, t.now()
	}
}

// end makes the socket readable by a single byte again. What is there already the kernel tells at once.
func (t *talker) end(fd uintptr) {
	if t.on {
		t.on, t.nap = false, false
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, 1) // cannot fail where raising it did not
	}
}

// close ends it for good. Others may wait for the socket from now on.
func (t *talker) close(raw syscall.RawConn) {
	if t.on {
		_ = raw.Control(t.end) // nobody waits for one that is closed
	}
	if t.clock != nil {
		t.clock.close()
		t.clock = nil
	}
}

// wait returns when the clock has rung.
func (t *talker) wait() {
	t.nap = false
	t.clock.wait()
}

// clock is a timer that is exact: the runtime's are late by up to a millisecond where nothing else is to do. Waiting
// for it takes no thread. See timerfd_create(2).
type clock struct {
	f    *os.File
	raw  syscall.RawConn
	ring func(fd uintptr) bool
	set  bool
	spec unix.ItimerSpec
	rung [8]byte
}

// newClock returns nil if there are too many, or no descriptor is left.
func newClock() *clock {
	if talkers.Add(1) > maxTalkers {
		talkers.Add(-1)
		return nil
	}
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		talkers.Add(-1)
		return nil
	}
	c := &clock{f: os.NewFile(uintptr(fd), "timerfd")}
	c.spec.Value = unix.NsecToTimespec(int64(talkNap))
	c.ring = c.try
	if c.raw, err = c.f.SyscallConn(); err != nil {
		c.close()
		return nil
	}
	return c
}

func (c *clock) close() {
	_ = c.f.Close() // nothing was written
	talkers.Add(-1)
}

func (c *clock) wait() {
	c.set = false
	_ = c.raw.Read(c.ring) // else there is no nap
}

// try winds the clock up when it is called first, and then reports whether it has rung. Neither call waits; the
// scheduler need not know of them: see quick.
func (c *clock) try(fd uintptr) bool {
	if !c.set {
		c.set = true
		_, _, errno := unix.RawSyscall6(unix.SYS_TIMERFD_SETTIME, fd, 0, uintptr(unsafe.Pointer(&c.spec)), 0, 0, 0)
		return errno != 0
	}
	_, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&c.rung)), uintptr(len(c.rung)))
	return errno != unix.EAGAIN && errno != unix.EINTR
}
