// Package netns makes sockets and does short pieces of work in another network
// namespace.
//
//	goroutine ── Do(f) ──▶ fresh goroutine locked to its thread
//	                         setns(pod) → f → setns(own) → unlock
//
// A thread belongs to one namespace at a time, so everything here happens on a
// goroutine of its own that owns its thread. A thread that cannot get back is
// never unlocked and dies with that goroutine: no other code ever runs on a
// thread in the wrong namespace. Nothing that blocks belongs inside: Listen and
// Dial enter a namespace for socket(2) alone, since a socket stays in the
// namespace it was created in whoever binds and connects it later.
//
// All methods of NS may be called from any goroutine. The package decides
// nothing about marks, addresses or ports; those come through the Control
// functions of net.Dialer and net.ListenConfig.
package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNotNetNS reports a file that is not a network namespace.
var ErrNotNetNS = errors.New("not a network namespace")

// NS is an open network namespace. It keeps the namespace alive until Close.
type NS struct {
	file  *os.File
	raw   syscall.RawConn // counts users of the descriptor against Close
	inode uint64
	own   bool // the process's: entering it needs no visit, and no privileges

	mu      sync.Mutex
	home    *os.File // nil before the first visit
	homeRaw syscall.RawConn
	closed  bool
}

// Open opens the namespace at path: /proc/PID/ns/net, or a bind mount of one.
// The caller watches the path if it has to know when the namespace's owner is gone.
func Open(path string) (*NS, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	n, err := FromFD(fd)
	if err != nil {
		_ = unix.Close(fd) // err says more
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	return n, nil
}

// FromFD takes over fd, which must be a network namespace. On error the caller
// still owns fd.
func FromFD(fd int) (*NS, error) {
	// The ioctl alone is not enough: other kinds of file may give its number a
	// meaning of their own, so the file system is asked too. ioctl_nsfs(2).
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return nil, fmt.Errorf("statfs: %w", err)
	}
	if fs.Type != unix.NSFS_MAGIC {
		return nil, ErrNotNetNS
	}
	kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil {
		return nil, fmt.Errorf("ask for the kind of namespace: %w", err)
	}
	if kind != unix.CLONE_NEWNET {
		return nil, ErrNotNetNS
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat: %w", err)
	}
	unix.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), "netns")
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("wrap descriptor: %w", err)
	}
	return &NS{file: f, raw: raw, inode: st.Ino}, nil
}

// Current opens the namespace of the calling thread.
func Current() (*NS, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return Open("/proc/thread-self/ns/net")
}

// Own is the namespace of the process, for code that works in namespaces where
// there is only this one. Work in it happens on the caller's own threads and
// needs no privileges; threads that were taken elsewhere do not count.
func Own() (*NS, error) {
	n, err := Open("/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	n.own = true
	return n, nil
}

// Inode returns the path's namespace number, or an error if there is none any
// more. Comparing it with NS.Inode tells whether a path still is that namespace.
func Inode(path string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0, fmt.Errorf("stat network namespace %s: %w", path, err)
	}
	if fs.Type != unix.NSFS_MAGIC {
		return 0, fmt.Errorf("stat network namespace %s: %w", path, ErrNotNetNS)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("stat network namespace %s: %w", path, err)
	}
	return st.Ino, nil
}

// FD returns the descriptor, owned by n; -1 once closed. It is for calls that
// end before anyone may call Close.
func (n *NS) FD() int { return int(n.file.Fd()) }

// Control runs f with the descriptor, which stays open until f returns whoever
// calls Close meanwhile.
func (n *NS) Control(f func(fd int)) error {
	return n.raw.Control(func(fd uintptr) { f(int(fd)) })
}

// Inode is the namespace's number: equal for two NS of one namespace, and not
// reused while one of them is open.
func (n *NS) Inode() uint64 { return n.inode }

// Dup returns a second NS of the same namespace, closed on its own.
func (n *NS) Dup() (*NS, error) {
	fd, err := -1, error(nil)
	if cerr := n.raw.Control(func(own uintptr) {
		fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0)
	}); cerr != nil {
		return nil, fmt.Errorf("duplicate network namespace: %w", cerr)
	}
	if err != nil {
		return nil, fmt.Errorf("duplicate network namespace: %w", err)
	}
	d, err := FromFD(fd)
	if err != nil {
		_ = unix.Close(fd) // err says more
		return nil, fmt.Errorf("duplicate network namespace: %w", err)
	}
	d.own = n.own
	return d, nil
}

// Close releases the descriptor once calls in flight have left. A second Close
// does nothing.
func (n *NS) Close() error {
	n.mu.Lock()
	n.closed = true
	if n.home != nil {
		_ = n.home.Close() // only ever entered
		n.home = nil
	}
	n.mu.Unlock()
	if err := n.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("close network namespace: %w", err)
	}
	return nil
}

// Do runs f with its thread inside n. f runs on a goroutine of its own, must not
// block for long, and must not hand its thread on.
//
// If the thread cannot get back Do reports it, even when f succeeded.
func (n *NS) Do(f func() error) error {
	if n.own {
		return f()
	}
	return n.do(f, setns)
}

func (n *NS) do(f func() error, leave func(home int) error) error {
	// errExit stays when f ends its goroutine (runtime.Goexit, as t.FailNow does).
	err := errExit
	donec := make(chan struct{})
	go func() {
		defer close(donec)
		home, herr := n.openHome()
		if herr != nil {
			err = herr
			return
		}
		// Both descriptors are held until the thread is back, whoever calls Close.
		var ferr error
		cerr := home.Control(func(hfd uintptr) {
			ferr = errClosed
			_ = n.Control(func(fd int) { ferr = visit(fd, int(hfd), f, leave) }) // ferr says it
		})
		err = errors.Join(cerr, ferr)
	}()
	<-donec
	return err
}

func visit(fd, home int, f func() error, leave func(home int) error) error {
	runtime.LockOSThread()
	if err := setns(fd); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace: %w", err)
	}
	err := f()
	if lerr := leave(home); lerr != nil {
		// Still locked: the runtime ends the thread with its goroutine.
		return errors.Join(err, fmt.Errorf("leave network namespace: %w", lerr))
	}
	runtime.UnlockOSThread()
	return err
}

// openHome returns the namespace threads come from. It is opened at the first
// visit, on a goroutine of ours since the caller's thread may be locked
// elsewhere, and kept with n: opening it costs more than a visit.
func (n *NS) openHome() (syscall.RawConn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, errClosed
	}
	if n.home == nil {
		f, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			return nil, fmt.Errorf("open own network namespace: %w", err)
		}
		raw, err := f.SyscallConn()
		if err != nil {
			_ = f.Close() // err says more
			return nil, fmt.Errorf("open own network namespace: %w", err)
		}
		n.home, n.homeRaw = f, raw
	}
	return n.homeRaw, nil
}

var (
	errExit   = errors.New("work in network namespace: goroutine ended by its function")
	errClosed = fmt.Errorf("enter network namespace: %w", os.ErrClosed)
)

func setns(fd int) error { return unix.Setns(fd, unix.CLONE_NEWNET) }
