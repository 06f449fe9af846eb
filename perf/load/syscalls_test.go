package load

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/test/netlab"
)

// TestSyscallsAreCounted makes a known number of calls, in this namespace of
// processes or another.
func TestSyscallsAreCounted(t *testing.T) {
	if reason := netlab.EBPF(); reason != nil {
		t.Skip(reason)
	}
	c, err := countSyscalls([]Process{{Name: "self", PID: os.Getpid()}, {Name: "nobody", PID: 1 << 30}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	const calls = 5000
	before := must(t, c, os.Getpid())
	for range calls {
		unix.Getppid()
	}
	if n := must(t, c, os.Getpid()) - before; n < calls || n > 2*calls {
		t.Errorf("%d calls were counted, %d were made", n, calls)
	}
	if n := must(t, c, 1<<30); n != 0 {
		t.Errorf("%d calls of nobody", n)
	}
}

func must(t *testing.T, c *syscalls, pid int) uint64 {
	t.Helper()
	n, err := c.of(pid)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
