package relay

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// parking is where ways wait that have nothing to do: with neither goroutine nor buffer, only a registration with
// epoll(7).
//
//	busy ──silent──► park ──readable, ended──► take ──► busy, on a goroutine of its own
//	                      ──cut──────────────► take ──► ended
//
// Whoever takes a way owns it: that is decided under mu, once for each time it is parked. An event names a slot and how
// often that was used, not a descriptor; so one that comes late, for a socket that is closed and whose number is
// another's now, finds nobody. The kernel forgets a registration with its socket.
type parking struct {
	mu    sync.Mutex
	fd    int    // of epoll; 0: not open yet
	slots []slot // the first is nobody's
	free  []uint32
}

// slot is one parked way; use tells it from those that had the slot before.
type slot struct {
	way *way
	use uint32
}

var parked parking

// park registers w, which waits for c, and reports whether it did; w is then the caller's no more.
func (p *parking) park(w *way, c sockopt.Socket) bool {
	_ = c.SetReadDeadline(time.Time{}) // fails on a closed socket, as registering will
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	fd, ev, err := p.enter(w)
	if err != nil {
		return false
	}
	cerr := raw.Control(func(s uintptr) { err = unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, int(s), &ev) })
	if cerr == nil && err == nil {
		return true
	}
	return !p.take(w) // else it was cut meanwhile
}

// enter gives w a slot, from which it can be taken.
func (p *parking) enter(w *way) (fd int, ev unix.EpollEvent, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.openLocked(); err != nil {
		return 0, ev, err
	}
	var i uint32
	if k := len(p.free); k > 0 {
		i, p.free = p.free[k-1], p.free[:k-1]
	} else {
		i = uint32(len(p.slots))
		p.slots = append(p.slots, slot{})
	}
	s := &p.slots[i]
	s.way, w.slot = w, i
	return p.fd, unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLONESHOT, Fd: int32(i), Pad: int32(s.use)}, nil
}

// take gets w out of its slot; only one of several callers does.
func (p *parking) take(w *way) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w.slot == 0 {
		return false
	}
	p.leaveLocked(w.slot)
	return true
}

// of takes the way that an event is about, nil if that has been taken.
func (p *parking) of(ev unix.EpollEvent) *way {
	i, use := uint32(ev.Fd), uint32(ev.Pad)
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.slots[i].way
	if w == nil || p.slots[i].use != use {
		return nil
	}
	p.leaveLocked(i)
	return w
}

func (p *parking) leaveLocked(i uint32) {
	s := &p.slots[i]
	s.way.slot = 0
	s.way = nil
	s.use++
	p.free = append(p.free, i)
}

// openLocked makes the epoll instance, and whoever waits for it, before the first way parks. Both stay.
func (p *parking) openLocked() error {
	if p.fd != 0 {
		return nil
	}
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // so that the runtime's poller takes it
		_ = unix.Close(fd)
		return os.NewSyscallError("fcntl", err)
	}
	f := os.NewFile(uintptr(fd), "epoll")
	raw, err := f.SyscallConn()
	if err != nil {
		_ = f.Close()
		return fmt.Errorf("wait for epoll: %w", err)
	}
	p.fd, p.slots = fd, make([]slot, 1)
	go p.wait(f, raw)
	return nil
}

// wait wakes those whose sockets have something. It waits as any goroutine does for a descriptor: without a thread.
func (p *parking) wait(f *os.File, raw syscall.RawConn) {
	events := make([]unix.EpollEvent, 128)
	n := 0
	ready := func(fd uintptr) bool {
		var err error
		for {
			if n, err = unix.EpollWait(int(fd), events, 0); err != unix.EINTR {
				break
			}
		}
		return n != 0 || err != nil
	}
	for raw.Read(ready) == nil {
		for _, ev := range events[:max(n, 0)] {
			if w := p.of(ev); w != nil {
				go w.wake()
			}
		}
		if n == len(events) {
			runtime.Gosched() // many end at once: those that are awake first, so that few goroutines do for all
		}
	}
	_ = f.Close() // tests end it
}

// wake goes on with a way that was parked.
func (w *way) wake() {
	c := w.socket()
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(s uintptr) { // a closed socket has no registration
			_ = unix.EpollCtl(parked.fd, unix.EPOLL_CTL_DEL, int(s), nil)
		})
	}
	w.run()
}
