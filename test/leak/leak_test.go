package leak

import (
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
)

func TestMain(m *testing.M) { Main(m) }

// Goroutines of tests do not run on the main thread, where a thread that is theirs could not end.
func TestMainThreadIsNobodys(t *testing.T) {
	const n = 100 // more than there are idle threads: all of them are taken
	var wg, all sync.WaitGroup
	all.Add(n)
	for range n {
		wg.Go(func() {
			runtime.LockOSThread()
			if syscall.Gettid() == os.Getpid() {
				t.Error("on the main thread")
			}
			all.Done()
			all.Wait()
			runtime.UnlockOSThread()
		})
	}
	wg.Wait()
}
