package relay

import (
	"errors"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

const (
	// lookEvery is how often ways are looked at: one that moved nothing between two looks parks.
	lookEvery = 400 * time.Millisecond
	// crowd is how many ways are looked at more often. A goroutine that waits costs some KiB, and who opens thousands of
	// connections at once uses few of them.
	crowd          = 512
	lookEveryCrowd = 50 * time.Millisecond
	// askAtOnce is how many are asked before others get their turn.
	askAtOnce = 32
)

// busySet are the ways on which a goroutine works or waits for a socket. Waiting like that is the quickest, so that who
// talks stays here; who is silent is asked to park. One look at all of them costs less than a timer each.
type busySet struct {
	mu      sync.Mutex
	first   *way // guarded by mu
	n       int
	looking bool
}

var busy busySet

// add says that a goroutine goes on with w.
func (s *busySet) add(w *way) {
	_, _, n := w.ends()
	s.mu.Lock()
	defer s.mu.Unlock()
	w.listed, w.asked, w.silent, w.moved = true, false, 0, n.Load()
	w.prev, w.next = nil, s.first
	if s.first != nil {
		s.first.prev = w
	}
	s.first = w
	if s.n++; !s.looking {
		s.looking = true
		go s.look()
	}
}

// remove ends that, and reports whether w has to park: it was asked to, and err is how that interrupts reading.
func (s *busySet) remove(w *way, err error) (park bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removeLocked(w)
	return w.asked && errors.Is(err, os.ErrDeadlineExceeded)
}

func (s *busySet) removeLocked(w *way) {
	if !w.listed {
		return
	}
	w.listed = false
	s.n--
	if w.prev != nil {
		w.prev.next = w.next
	} else {
		s.first = w.next
	}
	if w.next != nil {
		w.next.prev = w.prev
	}
	w.prev, w.next = nil, nil
}

// look runs while anything is busy.
func (s *busySet) look() {
	every := lookEvery
	for {
		time.Sleep(every)
		asked, n := s.sweep()
		for i, c := range asked {
			_ = c.SetReadDeadline(long) // one that is closed meanwhile needs no asking
			if i%askAtOnce == askAtOnce-1 {
				runtime.Gosched() // each parks on its goroutine: who talks must not wait for thousands of them
			}
		}
		if n == 0 {
			return
		}
		every = lookEvery
		if n > crowd {
			every = lookEveryCrowd
		}
	}
}

// long is a deadline that has passed.
var long = time.Unix(1, 0)

// sweep picks the ways that are to park, and reports how many others there are; with none, looking has ended.
func (s *busySet) sweep() (asked []sockopt.Socket, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := s.first; w != nil; {
		next := w.next
		_, _, n := w.ends()
		if moved := n.Load(); moved != w.moved {
			w.moved, w.silent = moved, 0
		} else if w.silent++; w.silent > 1 { // of the first look nobody knows how long it was
			w.asked = true
			s.removeLocked(w)
			asked = append(asked, w.socket())
		}
		w = next
	}
	s.looking = s.n > 0
	return asked, s.n
}
