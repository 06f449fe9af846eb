package netlab

import (
	"errors"
	"math/rand/v2"
	"net"
	"strconv"

	"golang.org/x/sys/unix"
)

// ListenAgain listens on a loopback port that the kernel gives nobody by itself
// (net.ipv4.ip_local_port_range begins above), so that it is still free when the
// listener is closed and somebody else is to listen there.
func ListenAgain(t TB) net.Listener {
	t.Helper()
	for {
		ln, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(20000+rand.IntN(10000))))
		if err == nil {
			return ln
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			t.Fatalf("%v", err)
		}
	}
}
