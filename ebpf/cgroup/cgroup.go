// Package cgroup finds directories of the cgroup2 hierarchy: where it is mounted,
// which one is above all pods, which one a process is in, and who is in one.
//
// It only reads /proc and cgroup2 directories and keeps nothing, so any goroutine
// may call it. It does not know what the directories are used for.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mounts are where systems mount the hierarchy: alone, or beside those of cgroup1.
var mounts = []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}

// podRoots are kubelet's directories above all pods, with systemd's names and with
// its own. https://kubernetes.io/docs/setup/production-environment/container-runtimes/#cgroup-drivers
var podRoots = []string{"kubepods.slice", "kubepods", "kubelet.slice/kubelet-kubepods.slice", "kubelet/kubepods"}

// Mount returns the directory at which the whole hierarchy is mounted.
func Mount() (string, error) {
	for _, dir := range mounts {
		if Is(dir) {
			return dir, nil
		}
	}
	return "", fmt.Errorf("find cgroup2: it is not mounted at %s", strings.Join(mounts, " nor "))
}

// Pods returns kubelet's directory above all pods.
func Pods(mount string) (string, error) {
	for _, name := range podRoots {
		if dir := filepath.Join(mount, name); Is(dir) {
			return dir, nil
		}
	}
	return "", fmt.Errorf("find the pods' cgroup: none of %s is in %s", strings.Join(podRoots, ", "), mount)
}

// Is reports whether dir is a cgroup2 directory.
func Is(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// Within reports whether dir is root or below it; both are clean and absolute.
func Within(dir, root string) bool {
	rel, err := filepath.Rel(root, dir)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// Below returns the name of one directory in dir, "" if there is none.
func Below(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", fmt.Errorf("list cgroups below %s: %w", dir, err)
	}
	for _, e := range entries {
		if e.IsDir() {
			return e.Name(), nil
		}
	}
	return "", nil
}

// Processes returns the processes of dir and of all directories below it, and for
// a threaded directory its threads. More than limit of them are an error.
func Processes(dir string, limit int) ([]int, error) {
	var all []int
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		ids, err := members(path)
		if err != nil {
			return err
		}
		if all = append(all, ids...); len(all) > limit {
			return fmt.Errorf("more than %d processes", limit)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list processes of cgroup %s: %w", dir, err)
	}
	return all, nil
}

func members(dir string) ([]int, error) {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if errors.Is(err, unix.EOPNOTSUPP) { // a threaded one lists no processes
		data, err = os.ReadFile(filepath.Join(dir, "cgroup.threads"))
	}
	if err != nil {
		return nil, err
	}
	var ids []int
	for f := range strings.FieldsSeq(string(data)) {
		id, err := strconv.Atoi(f)
		if err != nil {
			return nil, fmt.Errorf("process %q: %w", f, err)
		}
		ids = append(ids, id)
	}
	return ids, nil
}
