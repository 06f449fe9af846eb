//go:build !race

package sockopt

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/test/sockets"
)

// TestAllocOfAnOrigin: each captured connection is asked. The one allocation is
// the error's, which a pod without origins gets once in a thousand connections.
func TestAllocOfAnOrigin(t *testing.T) {
	_, c := sockets.Pair(t)
	var o Origin
	if got := testing.AllocsPerRun(200, func() {
		if err := ReadOrigin(c, &o); !errors.Is(err, unix.ENOPROTOOPT) {
			t.Fatal(err)
		}
	}); got > 1 {
		t.Errorf("%v allocations, at most 1", got)
	}
	if got := testing.AllocsPerRun(200, func() {
		if _, err := Info(c); err != nil {
			t.Fatal(err)
		}
	}); got > 0 {
		t.Errorf("%v allocations for TCP_INFO, want none", got)
	}
}
