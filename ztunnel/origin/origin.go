// Package origin tells which container and which program of a pod opened a
// connection, as far as that can be known.
//
//	accept ─→ Reader (one getsockopt: pid, thread name, cgroup id) ─→ Names.Note ─→ queue
//	                                                                                  │
//	access log ←─ Names.Of: executable, container ←─ bounded memory ←─ Run: /proc, cgroup2
//
// Kernel programs that capture connections say who connected; in-pod rules do
// not, and then nothing is known. Names need the node's first PID namespace
// (hostPID) for executables, and that or a mount of the node's cgroup2 hierarchy
// for containers; without either there are still pid, thread name and cgroup id.
//
// What comes out is for people to read and nothing else: a program chooses its
// own name, and a process may be gone before it is looked at. No decision may
// depend on it. Reader and the methods of Names never wait; Run is one goroutine
// that reads files.
package origin

import (
	"errors"
	"net"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// Origin is what the kernel said of a connection; the zero value is nothing.
type Origin = sockopt.Origin

// Reader reads the origins of one pod's connections.
type Reader struct{ skip atomic.Int32 }

// askAgain is after how many connections a pod whose connections had no origin is
// asked once more: its redirector may have been replaced. Arbitrary.
const askAgain = 1024

// Read fills to, if c has an origin.
func (r *Reader) Read(c net.Conn, to *Origin) {
	if r.skip.Load() > 0 && r.skip.Add(-1) >= 0 {
		return
	}
	tcp, ok := sockopt.SocketOf(c)
	if !ok {
		return
	}
	if err := sockopt.ReadOrigin(tcp, to); errors.Is(err, unix.ENOPROTOOPT) {
		r.skip.Store(askAgain)
	}
}

// Comm is the name of the thread that connected, fit to be shown.
func Comm(o Origin) string {
	n := 0
	for n < len(o.Comm) && o.Comm[n] != 0 {
		n++
	}
	return Printable(o.Comm[:n])
}

// maxName bounds a name in a log line; PATH components have up to 255 bytes.
const maxName = 64

// Printable keeps of a name that an application chose what cannot confuse a
// reader, a terminal or whoever takes a log line apart.
func Printable[B []byte | string](name B) string {
	b := []byte(name[:min(len(name), maxName)])
	for i, c := range b {
		if c < ' ' || c > '~' || c == '"' || c == '\\' || c == '\'' || c == '`' {
			b[i] = '?'
		}
	}
	return string(b)
}
