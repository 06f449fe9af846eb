package redirect_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// Tens of thousands of sockets: threads with descriptors of their own, since a process
// has some thousands only, and no goroutine for each, which the race detector has some
// thousands of.

// crowdFiles is how many sockets a thread has.
const crowdFiles = 12_000

// crew is threads that end together.
type crew struct {
	stop  [2]int // a pipe; its end is the crew's
	group sync.WaitGroup
}

func newCrew(t *testing.T) *crew {
	t.Helper()
	c := &crew{}
	check(t, unix.Pipe2(c.stop[:], unix.O_CLOEXEC))
	t.Cleanup(func() {
		_, _ = unix.Write(c.stop[1], make([]byte, 64)) // nobody reads it: all see it
		c.group.Wait()
		_ = unix.Close(c.stop[0])
		_ = unix.Close(c.stop[1])
	})
	return c
}

// join runs f on a thread with descriptors of its own.
func (c *crew) join(t *testing.T, cg *netlab.Cgroup, ns *netns.NS, f func() error) {
	c.group.Go(func() {
		if err := apart(cg, ns, func() error { return both(unix.Unshare(unix.CLONE_FILES), f()) }); err != nil {
			t.Error(err)
		}
	})
}

// serve has threads accept connections of ln for as many as there may be at a time.
// of handles one and tells a second descriptor that lives as long, or -1.
func (c *crew) serve(t *testing.T, cg *netlab.Cgroup, ns *netns.NS, ln net.Listener, most int, of func(fd int, from netip.AddrPort) int) {
	t.Helper()
	f, err := ln.(*net.TCPListener).File()
	check(t, err, ln.Close())
	lfd := int(f.Fd())
	check(t, unix.SetNonblock(lfd, true))
	t.Cleanup(func() { f.Close() })
	for n := 0; n <= most; n += crowdFiles / 2 {
		c.join(t, cg, ns, func() error {
			w := server{lfd: lfd, of: of, live: map[int]int{}}
			return w.run(c.stop[0])
		})
	}
}

type server struct {
	ep, lfd   int
	accepting bool
	of        func(fd int, from netip.AddrPort) int
	live      map[int]int // what of returned, by connection
}

func (w *server) run(stop int) (err error) {
	if w.ep, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	if err := errors.Join(w.watch(stop, unix.EPOLLIN), w.accept()); err != nil {
		return err
	}
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(w.ep, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		for _, e := range events[:max(n, 0)] {
			switch int(e.Fd) {
			case stop:
				return nil // descriptors end with the thread
			case w.lfd:
				err = w.take()
			default:
				err = w.drop(int(e.Fd))
			}
			if err != nil {
				return err
			}
		}
	}
}

func (w *server) watch(fd int, events uint32) error {
	return unix.EpollCtl(w.ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

func (w *server) accept() error {
	w.accepting = true
	return w.watch(w.lfd, unix.EPOLLIN|unix.EPOLLEXCLUSIVE)
}

func (w *server) take() error {
	fd, from, err := unix.Accept4(w.lfd, unix.SOCK_CLOEXEC)
	if err != nil {
		return nil // another thread was quicker, or the client has gone
	}
	a := addrPort(from)
	w.live[fd] = w.of(fd, netip.AddrPortFrom(a.Addr().Unmap(), a.Port()))
	if err := w.watch(fd, unix.EPOLLIN|unix.EPOLLRDHUP); err != nil {
		return err
	}
	if len(w.live) < crowdFiles/2 {
		return nil
	}
	w.accepting = false
	return unix.EpollCtl(w.ep, unix.EPOLL_CTL_DEL, w.lfd, nil)
}

func (w *server) drop(fd int) error {
	_ = unix.Close(fd) // its client has gone
	if d := w.live[fd]; d >= 0 {
		_ = unix.Close(d) // as its client
	}
	delete(w.live, fd)
	if w.accepting {
		return nil
	}
	return w.accept()
}

// hold has threads open n connections by call and hold them until the crew ends.
func (c *crew) hold(t *testing.T, cg *netlab.Cgroup, ns *netns.NS, n int, call func(i int) error) {
	t.Helper()
	var opened sync.WaitGroup
	for first := 0; first < n; first += crowdFiles {
		opened.Add(1)
		c.join(t, cg, ns, func() error {
			for i := first; i < min(first+crowdFiles, n); i++ {
				if err := call(i); err != nil {
					opened.Done()
					return fmt.Errorf("connection %d: %w", i, err)
				}
			}
			opened.Done()
			for {
				if _, err := unix.Poll([]unix.PollFd{{Fd: int32(c.stop[0]), Events: unix.POLLIN}}, -1); !errors.Is(err, unix.EINTR) {
					return err
				}
			}
		})
		opened.Wait() // one after another: 60 thousand take seconds
	}
}

// callWithin is one connection whose line is compared; the caller closes it.
func callWithin(to netip.AddrPort, want string) (int, error) {
	fd, err := stream(to.Addr(), 0, 0)
	if err != nil {
		return -1, err
	}
	if err = dial(fd, to); err == nil {
		err = readLine(fd, want)
	}
	if err != nil {
		_ = unix.Close(fd) // err says more
		return -1, fmt.Errorf("connect to %v: %w", to, err)
	}
	return fd, nil
}

func readLine(fd int, want string) error {
	b := make([]byte, 128)
	for {
		n, err := unix.Read(fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && string(b[:n]) != want {
			err = fmt.Errorf("answered %q, want %q", b[:n], want)
		}
		return err
	}
}
