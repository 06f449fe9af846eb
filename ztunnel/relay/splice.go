package relay

import (
	"net"
	"sync/atomic"
)

func spliceConn(src, dst *net.TCPConn, n *atomic.Uint64) error { return copyBuffered(src, dst, n) }
