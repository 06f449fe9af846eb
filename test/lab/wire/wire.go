// Package wire watches the lab's cables for the beginnings of TCP connections: who
// sends a SYN to whom, and on which interfaces it is seen. That is how the lab
// shows that nothing between pods of the mesh leaves in clear text.
//
//	packet socket per network namespace ─▶ filter in the kernel (SYN, not loopback) ─▶ Log
//
// A socket is bound to no interface, so it sees those that come later too. One
// goroutine per namespace reads; a Log may be used by all of them.
package wire

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/test/netlab"
)

// Start is the beginning of a connection: a SYN as it passed an interface.
type Start struct {
	Where string     `json:"where"` // the namespace
	Link  string     `json:"link"`
	Src   netip.Addr `json:"src"`
	Dst   netip.Addr `json:"dst"`
	Port  uint16     `json:"port"`
}

func (s Start) String() string {
	return fmt.Sprintf("%s %s: %s -> %s", s.Where, s.Link, s.Src, netip.AddrPortFrom(s.Dst, s.Port))
}

// Log counts starts. Its size is bound by the pairs of addresses and ports that
// talk, not by their connections.
type Log struct {
	first func(Start)

	mu      sync.Mutex
	seen    map[Start]int // guarded by mu
	dropped int           // guarded by mu
}

// NewLog returns a log that calls first, which must not block for long, for each
// start that is unlike all before.
func NewLog(first func(Start)) *Log { return &Log{first: first, seen: map[Start]int{}} }

func (l *Log) add(s Start) {
	l.mu.Lock()
	l.seen[s]++
	n := l.seen[s]
	l.mu.Unlock()
	if n == 1 {
		l.first(s)
	}
}

// Count is how often a start was seen.
type Count struct {
	Start
	Count int `json:"count"`
}

// Counts returns all of them in order, and how many packets the kernel had no room
// for: with any, the log is incomplete.
func (l *Log) Counts() (all []Count, dropped int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range slices.SortedFunc(maps.Keys(l.seen), func(a, b Start) int {
		return cmp.Or(cmp.Compare(a.Where, b.Where), cmp.Compare(a.Link, b.Link), a.Src.Compare(b.Src), a.Dst.Compare(b.Dst), cmp.Compare(a.Port, b.Port))
	}) {
		all = append(all, Count{s, l.seen[s]})
	}
	return all, l.dropped
}

// Watcher reads the packets of one namespace.
type Watcher struct {
	host *netlab.Host
	log  *Log
	file *os.File

	names map[int]string // of interfaces; owned by read
	donec chan struct{}
}

// Watch begins at once: what is sent after it returns is seen. The namespace lives
// until Close.
func (l *Log) Watch(h *netlab.Host) (*Watcher, error) {
	fd := -1
	err := h.NS.Do(func() (err error) {
		// Without a protocol it receives nothing, until the filter is there.
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", h.Name, err)
	}
	if err := listen(fd); err != nil {
		_ = unix.Close(fd) // nothing was received
		return nil, fmt.Errorf("watch %s: %w", h.Name, err)
	}
	w := &Watcher{host: h, log: l, file: os.NewFile(uintptr(fd), "packets of "+h.Name), names: map[int]string{}, donec: make(chan struct{})}
	go w.read()
	return w, nil
}

func listen(fd int) error {
	raw, err := bpf.Assemble(filter)
	if err != nil {
		return err
	}
	prog := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		prog[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20) // fewer losses, if allowed
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}); err != nil {
		return fmt.Errorf("attach filter: %w", err)
	}
	const all = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8 // network byte order
	return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all & 0xffff})
}

// Close ends the watch, after the last packet that came, and adds the kernel's
// losses to the log.
func (w *Watcher) Close() error {
	err := w.file.SetReadDeadline(time.Unix(1, 0)) // long ago
	<-w.donec
	raw, rerr := w.file.SyscallConn()
	if rerr == nil {
		rerr = raw.Control(func(fd uintptr) {
			stats, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS)
			if err == nil {
				w.log.mu.Lock()
				w.log.dropped += int(stats.Drops)
				w.log.mu.Unlock()
			}
		})
	}
	return errors.Join(err, rerr, w.file.Close())
}

// read takes packets until Close.
func (w *Watcher) read() {
	defer close(w.donec)
	raw, err := w.file.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, snap)
	for err == nil {
		err = raw.Read(func(fd uintptr) bool {
			return w.take(int(fd), buf)
		})
	}
	_ = raw.Control(func(fd uintptr) { // what has come and was not read yet
		for w.take(int(fd), buf) {
		}
	})
}

// take reads one packet; false means that there is none.
func (w *Watcher) take(fd int, buf []byte) bool {
	n, from, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT)
	if err != nil {
		return !errors.Is(err, unix.EAGAIN) // ENETDOWN and the like: an interface went
	}
	link, ok := from.(*unix.SockaddrLinklayer)
	if src, dst, syn := parse(buf[:n]); ok && syn {
		w.log.add(Start{w.host.Name, w.name(link.Ifindex), src, dst.Addr(), dst.Port()})
	}
	return true
}

func (w *Watcher) name(index int) string {
	if w.names[index] == "" {
		w.names[index] = fmt.Sprintf("interface %d", index) // one that has gone
		_ = w.host.NS.Do(func() error {
			if i, err := net.InterfaceByIndex(index); err == nil {
				w.names[index] = i.Name
			}
			return nil
		})
	}
	return w.names[index]
}
