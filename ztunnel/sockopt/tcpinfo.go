package sockopt

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// TCPInfo is what the kernel knows of a connection's past (TCP_INFO, tcp(7);
// struct tcp_info in linux/tcp.h). Its clock ticks with the kernel's, every 1
// to 10 ms.
type TCPInfo struct {
	RTT         time.Duration // smoothed
	Retransmits uint32        // segments sent again
	// Busy is how long there was data to send or to be acknowledged. Of that
	// time, RwndLimited passed because the receiver took no more, and
	// SndbufLimited because our buffer held no more; the rest is the network's.
	Busy, RwndLimited, SndbufLimited time.Duration
	// Ended says that both ends are done with it, and know: all that was written
	// has arrived.
	Ended bool
}

// Since is what has happened after an earlier look; the round trip stays the
// latest.
func (i TCPInfo) Since(earlier TCPInfo) TCPInfo {
	i.Retransmits -= earlier.Retransmits
	i.Busy -= earlier.Busy
	i.RwndLimited -= earlier.RwndLimited
	i.SndbufLimited -= earlier.SndbufLimited
	return i
}

// Info reads TCP_INFO.
func Info(c Socket) (TCPInfo, error) {
	r := infoReaders.Get().(*infoReader)
	defer infoReaders.Put(r)
	r.info = unix.TCPInfo{} // an older kernel fills less of it: the rest stays zero
	if err := controlSocket(c, r.read); err != nil {
		return TCPInfo{}, fmt.Errorf("read TCP_INFO: %w", err)
	}
	if r.err != nil {
		return TCPInfo{}, os.NewSyscallError("getsockopt TCP_INFO", r.err)
	}
	ti := &r.info
	return TCPInfo{
		RTT: micros(uint64(ti.Rtt)), Retransmits: ti.Total_retrans,
		Ended: ti.State == tcpClose, Busy: micros(ti.Busy_time), RwndLimited: micros(ti.Rwnd_limited), SndbufLimited: micros(ti.Sndbuf_limited),
	}, nil
}

// tcpClose is TCP_CLOSE (linux/tcp_states.h). A socket whose connection still waits
// for stray segments (TIME-WAIT) has it, too: that is no longer the socket's.
const tcpClose = 7

// infoReader is kept, with its function: each connection would make them.
type infoReader struct {
	info unix.TCPInfo
	err  error
	read func(fd uintptr)
}

var infoReaders = sync.Pool{New: func() any {
	r := new(infoReader)
	r.read = func(fd uintptr) {
		r.err = get(int(fd), unix.SOL_TCP, unix.TCP_INFO, &r.info)
	}
	return r
}}

func micros(n uint64) time.Duration { return time.Duration(n) * time.Microsecond }
