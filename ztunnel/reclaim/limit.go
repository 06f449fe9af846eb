package reclaim

import (
	"context"
	"math"
	"os"
	"path"
	"strconv"
	"strings"
	"time"
)

const (
	// runtimeShare leaves a part to the kernel: a container's memory is also that of its sockets, and of what lies in them.
	runtimeShare = 0.65
	// lookAgain is how long it takes to see that the limit is another: it may be changed while the container runs.
	// https://kubernetes.io/docs/tasks/configure-pod-container/resize-container-resources/
	lookAgain = 30 * time.Second
)

// Limit is how much memory the container may use, in bytes; 0 is no limit.
type Limit uint64

// Runtime is what of it the Go runtime may use: near that, collecting more often is better than being killed.
func (l Limit) Runtime() int64 {
	if l == 0 {
		return math.MaxInt64
	}
	return int64(float64(l) * runtimeShare)
}

// ReadLimit finds the limit of the process's control group.
func ReadLimit() Limit {
	return groupLimit(func(name string) string {
		b, err := os.ReadFile(name)
		if err != nil {
			return "" // another version of control groups, or none
		}
		return string(b)
	})
}

// Follow calls changed whenever read finds another limit than was, until ctx ends. That the file cannot be read for once
// is no reason to take all there is.
func Follow(ctx context.Context, was Limit, read func() Limit, changed func(Limit)) error {
	t := time.NewTicker(lookAgain)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil
		}
		if now := read(); now != was && now != 0 {
			was = now
			changed(now)
		}
	}
}

const root = "/sys/fs/cgroup"

// groupLimit is the lowest limit of the process's control group and those around it, 0 for none. Inside a container the
// path may be the host's, of which only the end or nothing is mounted; the container's own group is the root then.
//
// https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroups(7)
func groupLimit(read func(name string) string) Limit {
	least := uint64(math.MaxUint64)
	for line := range strings.Lines(read("/proc/self/cgroup")) {
		_, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		controllers, group, ok2 := strings.Cut(rest, ":")
		if !ok || !ok2 {
			continue
		}
		dir, file := root, "memory.max"
		if controllers == "memory" {
			dir, file = root+"/memory", "memory.limit_in_bytes"
		} else if controllers != "" {
			continue
		}
		for group = path.Clean("/" + group); ; group = path.Dir(group) {
			if v, err := strconv.ParseUint(strings.TrimSpace(read(path.Join(dir, group, file))), 10, 64); err == nil && v > 0 {
				least = min(least, v)
			}
			if group == "/" {
				break
			}
		}
	}
	const most = 1 << 60 // what version 1 says for none is near the largest number
	if least > most {
		return 0
	}
	return Limit(least)
}
