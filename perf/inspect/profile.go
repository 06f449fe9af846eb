package inspect

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Target is a process that tells about itself.
type Target struct {
	Name  string
	PID   int
	Admin string // host:port of its admin port, in its own network
}

// Window is the time a profile is about.
type Window struct {
	Before time.Duration // until it begins: nothing of it is profiled
	For    time.Duration
}

// traceFor is how much of a window is traced: traces of more are large, and tools
// are slow to open them.
const traceFor = time.Second

// profiles are the kinds, by the name of their file.
func (w Window) profiles() map[string]string {
	s := int(math.Ceil(w.For.Seconds()))
	return map[string]string{
		"cpu.pb.gz":    fmt.Sprintf("profile?seconds=%d", s),
		"allocs.pb.gz": fmt.Sprintf("allocs?seconds=%d", s),
		"block.pb.gz":  fmt.Sprintf("block?seconds=%d", s),
		"mutex.pb.gz":  fmt.Sprintf("mutex?seconds=%d", s),
		"trace":        fmt.Sprintf("trace?seconds=%.1f", min(w.For, traceFor).Seconds()),
	}
}

// Profile keeps what targets do in a window: CPU, allocations, waits, locks and a
// trace, then the heap. Files are dir/PREFIX.TARGET.KIND. What cannot be had is in
// the error, all else is kept.
func (c *Client) Profile(ctx context.Context, dir, prefix string, w Window, targets []Target) error {
	select {
	case <-time.After(w.Before):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	var mu sync.Mutex
	var errs []error
	keep := func(t Target, file, page string) {
		b, err := c.Get(ctx, t.PID, "http://"+t.Admin+"/debug/pprof/"+page)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, FileName(prefix+"."+t.Name+"."+file)), b, 0o644)
		}
		if err != nil {
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, fmt.Errorf("profile %s, %s: %w", t.Name, file, err))
		}
	}
	var live sync.WaitGroup
	for _, t := range targets {
		for file, page := range w.profiles() {
			live.Go(func() { keep(t, file, page) })
		}
	}
	live.Wait()
	for _, t := range targets {
		keep(t, "heap.pb.gz", "heap")
	}
	return errors.Join(errs...)
}

// FileName makes a name of one file of any text.
func FileName(s string) string {
	return strings.Map(func(r rune) rune {
		if strings.ContainsRune("/\\: ", r) {
			return '_'
		}
		return r
	}, s)
}
