package reclaim

import (
	"math"
	"os"
	"path"
	"runtime/debug"
	"strconv"
	"strings"
)

// share of the container's limit that the runtime may use; the rest is for the program's own pages and the kernel's.
const share = 0.9

// SetLimit keeps the runtime below the memory limit of the process's control group and returns what it has set, 0 where
// there is no limit. Near it, collecting more often is better than being killed.
func SetLimit() uint64 {
	limit := groupLimit(func(name string) string {
		b, err := os.ReadFile(name)
		if err != nil {
			return "" // another version of control groups, or none
		}
		return string(b)
	})
	if limit == 0 {
		return 0
	}
	limit = uint64(float64(limit) * share)
	debug.SetMemoryLimit(int64(limit))
	return limit
}

const root = "/sys/fs/cgroup"

// groupLimit is the lowest limit of the process's control group and those around it, 0 for none. Inside a container the
// path may be the host's, of which only the end or nothing is mounted; the container's own group is the root then.
//
// https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroups(7)
func groupLimit(read func(name string) string) uint64 {
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
	return least
}
