package hbone

import (
	"bytes"
	"errors"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// socketPair returns two ends that would wait if asked to.
func socketPair(t *testing.T) (a, b int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = unix.Close(fds[0]), unix.Close(fds[1]) })
	return fds[0], fds[1]
}

// Calls in public go to the socket as it is, so the pair does not wait in the tests that make many of them.
func nonblocking(t *testing.T, fds ...int) {
	t.Helper()
	for _, fd := range fds {
		if err := unix.SetNonblock(fd, true); err != nil {
			t.Fatal(err)
		}
	}
}

func TestQuickCallsMoveBytes(t *testing.T) {
	a, b := socketPair(t)
	nonblocking(t, a, b)
	in, out := quick{unseen: true}, quick{unseen: true}
	big := make([]byte, 64)
	for round := range byte(3 * quickCalls) { // in public, too
		p := [][]byte{{round}, {round + 1, round + 2}, {round + 3}}
		if n, err := out.writev(uintptr(a), p); n != 4 || err != 0 {
			t.Fatal("writev", n, err)
		}
		if n, err := out.write(uintptr(a), []byte{round + 4}); n != 1 || err != 0 {
			t.Fatal("write", n, err)
		}
		if n, err := in.readv(uintptr(b), [][]byte{big[:2], big[10:11]}); n != 3 || err != 0 {
			t.Fatal("readv", n, err)
		}
		if n, err := in.read(uintptr(b), big[20:]); n != 2 || err != 0 {
			t.Fatal("read", n, err)
		}
		got := []byte{big[0], big[1], big[10], big[20], big[21]}
		if want := []byte{round, round + 1, round + 2, round + 3, round + 4}; !bytes.Equal(got, want) {
			t.Fatalf("got %v, want %v", got, want)
		}
	}
	if in.iov != [maxParts]unix.Iovec{} || out.iov != in.iov {
		t.Error("memory of former calls is kept")
	}
}

// Even on a socket that would wait, nobody waits.
func TestQuickCallsNeverWait(t *testing.T) {
	a, b := socketPair(t)
	q := quick{unseen: true}
	p := make([]byte, 1<<10)
	for name, call := range map[string]func() (int, syscall.Errno){
		"read":  func() (int, syscall.Errno) { return q.read(uintptr(b), p) },
		"readv": func() (int, syscall.Errno) { return q.readv(uintptr(b), [][]byte{p[:1], p[1:]}) },
	} {
		q.rested()
		if n, err := call(); n != 0 || err != unix.EAGAIN {
			t.Errorf("%s of nothing: %d, %v", name, n, err)
		}
	}
	for name, call := range map[string]func() (int, syscall.Errno){
		"write":  func() (int, syscall.Errno) { return q.write(uintptr(a), p) },
		"writev": func() (int, syscall.Errno) { return q.writev(uintptr(a), [][]byte{p[:1], p[1:]}) },
	} {
		for i := 0; ; i++ {
			q.rested()
			n, err := call()
			if err == unix.EAGAIN {
				break
			}
			if n <= 0 || err != 0 || i > 1<<20 {
				t.Fatalf("%s: %d, %v", name, n, err)
			}
		}
	}
}

func TestQuickCallsTellEnds(t *testing.T) {
	for public := range 2 {
		a, b := socketPair(t)
		nonblocking(t, a, b)
		q := quick{calls: public * (quickCalls - 1), unseen: true}
		if err := unix.Shutdown(a, unix.SHUT_WR); err != nil {
			t.Fatal(err)
		}
		if n, err := q.read(uintptr(b), make([]byte, 1)); n != 0 || err != 0 {
			t.Errorf("read at the end: %d, %v", n, err)
		}
		q.calls = public * (quickCalls - 1)
		if n, err := q.write(uintptr(a), []byte{1}); n > 0 || !errors.Is(err, unix.EPIPE) {
			t.Errorf("write behind the end: %d, %v", n, err)
		}
	}
}

// The scheduler's monitor is woken by whoever goes on without having waited.
func TestQuickCallsBecomePublic(t *testing.T) {
	q := quick{unseen: true}
	seen := 0
	for range 4 * quickCalls {
		if q.public() {
			seen++
		}
	}
	if want := 4; seen != want {
		t.Errorf("%d of %d calls in public, want %d", seen, 4*quickCalls, want)
	}
	for range 4 * quickCalls {
		q.rested()
		if q.public() {
			t.Fatal("in public though it has just waited")
		}
	}
}
