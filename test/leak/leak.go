// Package leak fails a package's tests when goroutines or descriptors outlive them.
//
//	func TestMain(m *testing.M) { leak.Main(m) }
package leak

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"
)

// The main thread is the main goroutine's for good. A test's goroutine that has locked its thread and ends takes the
// thread with it, and whatever namespace or cgroup that was in. The main thread alone does not end: it would stay there,
// and with it /proc/self, which is its.
var _ = func() struct{} { runtime.LockOSThread(); return struct{}{} }()

// grace is how long what is ending may take to end. It is waited for only when something is still there.
const grace = 30 * time.Second

// Main runs the tests and exits, with a failure if anything is left over.
func Main(m *testing.M) {
	before := Descriptors()
	code := m.Run()
	if code == 0 {
		if left := Check(before); left != "" {
			fmt.Fprintln(os.Stderr, left)
			code = 1
		}
	}
	os.Exit(code)
}

// Check returns a description of goroutines and descriptors that are left over, or "".
func Check(before []string) string {
	var left string
	for deadline := time.Now().Add(grace); ; time.Sleep(10 * time.Millisecond) {
		left = describe(before)
		if left == "" || time.Now().After(deadline) {
			return left
		}
		runtime.GC() // runs cleanups of descriptors that were let go
	}
}

func describe(before []string) string {
	var b strings.Builder
	if gs := Goroutines(); len(gs) > 0 {
		fmt.Fprintf(&b, "leak: %d goroutines left over:\n\n%s\n", len(gs), strings.Join(gs, "\n\n"))
	}
	for _, fd := range Descriptors() {
		if !slices.Contains(before, fd) {
			fmt.Fprintf(&b, "leak: descriptor %s left open\n", fd)
		}
	}
	return b.String()
}

// Goroutines returns the stacks of goroutines other than the runtime's, the testing package's and the caller.
func Goroutines() []string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	stacks := strings.Split(string(buf), "\n\n")
	return slices.DeleteFunc(stacks[1:], expected) // the first is the caller's own
}

func expected(stack string) bool {
	for _, s := range []string{
		"testing.(*M).", "testing.(*T).Run(", "testing.tRunner(", "testing.runFuzz", "testing.(*F).", "os/signal.", "runtime.ensureSigM",
		"runtime/pprof.", "runtime/trace.", "runtime.goexit0", "created by runtime", "runtime.ReadTrace",
		"relay.(*parking).wait(", // one for the process, as the runtime's poller
	} {
		if strings.Contains(stack, s) {
			return true
		}
	}
	return strings.TrimSpace(stack) == ""
}

// Descriptors lists open descriptors as "number target", without the ones the runtime keeps for itself.
func Descriptors() []string {
	debug.FreeOSMemory() // closes what only a finalizer or cleanup would close
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil // nothing to compare on this system
	}
	var fds []string
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || strings.HasPrefix(target, "anon_inode:") || strings.HasPrefix(target, "/proc/") || strings.HasPrefix(target, "/sys/") {
			continue // the poller, and the directory being read
		}
		fds = append(fds, e.Name()+" "+target)
	}
	return fds
}
