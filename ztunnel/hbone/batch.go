package hbone

import (
	"net"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ztunnel/record"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// gsoLimit is what the kernel hands to a device in one piece at most, less its own headers
// (https://docs.kernel.org/networking/segmentation-offloads.html).
const gsoLimit = 65536 - 320

// batchFor is how much plaintext a bulk sender puts into one batch: about largeBlock, but so that its records fill the
// packets that the kernel makes of them. A little more would be one small packet more per batch, and that costs as much
// as a large one all the way.
func batchFor(c net.Conn) int {
	tcp, ok := sockopt.SocketOf(c)
	if !ok {
		return largeBlock
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return largeBlock
	}
	var mss int
	if cerr := raw.Control(func(fd uintptr) { mss, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG) }); cerr != nil || err != nil {
		return largeBlock
	}
	return batchOf(mss)
}

func batchOf(mss int) int {
	const records = largeBlock / recordLen
	const most = largeBlock + records*record.Overhead
	if mss <= 0 || mss > gsoLimit {
		return largeBlock
	}
	packet := gsoLimit / mss * mss
	return most/packet*packet - records*record.Overhead
}
