package hbone

import (
	"net"
	"syscall"
)

// lostWatcher is told that a stream is lost.
type lostWatcher = interface{ Lost(err error) }

// Watch has w told, once at most and by a goroutine of its own, that the stream was reset or its tunnel lost. It is for
// who has read to the end and has nothing to send at the moment: neither a read nor a write would tell it. A peer that
// has said all and wants to hear no more (RST_STREAM with NO_ERROR or CANCEL) is not lost: the next write fails.
func (s *Stream) Watch(w lostWatcher) {
	s.mu.Lock()
	s.watcher = w
	s.mu.Unlock()
	s.t.w.mu.Lock()
	err := s.sendErr
	s.t.w.mu.Unlock()
	switch err {
	case nil, syscall.EPIPE, net.ErrClosed: // it was ended
		return
	}
	s.mu.Lock() // it was lost before, by somebody who may have found no watcher
	s.tellLocked(err)
	s.mu.Unlock()
}

// tellLocked tells the watcher, which may hold what it waits for.
func (s *Stream) tellLocked(err error) {
	if w := s.watcher; w != nil {
		s.watcher = nil
		go w.Lost(err)
	}
}
