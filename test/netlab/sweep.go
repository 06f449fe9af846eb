package netlab

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// testCgroup is the directory of a test process's cgroups, by its number.
func testCgroup(pid int) string { return fmt.Sprintf("%s%d", testCgroups, pid) }

const testCgroups = "ambit-test-"

// SweepCgroups removes what test processes that were killed left in a cgroup2
// directory: empty cgroups of dead processes. Whatever is in use stays.
func SweepCgroups(dir string) {
	left, _ := filepath.Glob(filepath.Join(dir, testCgroups+"*")) // the pattern is valid
	for _, path := range left {
		pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(path), testCgroups))
		if err != nil || pid == os.Getpid() || syscall.Kill(pid, 0) != syscall.ESRCH {
			continue
		}
		if b, err := os.ReadFile(filepath.Join(path, "cgroup.events")); err != nil || strings.Contains(string(b), "populated 1") {
			continue
		}
		children, _ := filepath.Glob(filepath.Join(path, "*", "cgroup.procs")) // as above
		for _, c := range children {
			_ = syscall.Rmdir(filepath.Dir(c)) // the next sweep tries again
		}
		_ = syscall.Rmdir(path) // as above
	}
}
