package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrOutside reports a process whose directory cannot be seen from here.
var ErrOutside = errors.New("its cgroup is out of sight: run in the host's PID namespace (hostPID) with the host's whole cgroup2 hierarchy mounted")

// OfProcess returns the directory of a process, below the mount that holds near.
//
// The kernel names it relative to the reader's cgroup namespace, and so it does
// with the mount's own root (cgroup_namespaces(7)). Where either is above the
// reader's root its name is lost ("/../.."), and the directory is looked for.
func OfProcess(pid int, near string) (string, error) {
	if pid == 0 {
		return "", fmt.Errorf("find the cgroup of a process in another PID namespace: %w", ErrOutside)
	}
	dir, point, err := find(pid, near)
	if errors.Is(err, ErrOutside) {
		dir, err = search(pid, point)
	}
	if err != nil {
		return "", fmt.Errorf("find the cgroup of process %d: %w", pid, err)
	}
	// What the names say is believed once the directory says it too.
	ids, err := members(dir)
	if err != nil {
		return "", fmt.Errorf("see whether process %d is in cgroup %s: %w", pid, dir, err)
	}
	if !slices.Contains(ids, pid) {
		return "", fmt.Errorf("process %d is not in cgroup %s, although /proc says so: %w", pid, dir, ErrOutside)
	}
	return dir, nil
}

// find goes by names.
func find(pid int, near string) (dir, point string, err error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", "", err
	}
	point, root, err := mountOf(string(info), near)
	if err != nil {
		return "", "", err
	}
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if errors.Is(err, fs.ErrNotExist) {
		return "", point, errors.New("the process is gone")
	} else if err != nil {
		return "", point, err
	}
	path, err := unified(string(data))
	if err != nil {
		return "", point, err
	}
	dir, err = place(point, root, path)
	return dir, point, err
}

// search looks for the directory below point that lists the process. A node has
// a few thousand directories at most.
func search(pid int, point string) (string, error) {
	found := ""
	err := filepath.WalkDir(point, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // went meanwhile
		}
		if err != nil || !d.IsDir() {
			return err
		}
		ids, err := members(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
			return err
		}
		if slices.Contains(ids, pid) {
			found = path
			// The list of a threaded domain has what is in the directories below it too.
			if !threaded(path) {
				return fs.SkipAll
			}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if found == "" {
		return "", ErrOutside
	}
	return found, nil
}

// threaded reports a directory whose processes have threads in others below it.
func threaded(dir string) bool {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.type"))
	return err == nil && string(data) == "domain threaded\n"
}

// unified reads a file of the form of /proc/PID/cgroup: "0::PATH" is cgroup2's line.
func unified(data string) (string, error) {
	for line := range strings.Lines(data) {
		if path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			if !strings.HasPrefix(path, "/") {
				return "", fmt.Errorf("path %q is not absolute", path)
			}
			if strings.HasSuffix(path, " (deleted)") {
				return "", errors.New("its directory was deleted")
			}
			return path, nil
		}
	}
	return "", errors.New("it is in no cgroup2 hierarchy")
}

// mountOf returns the point and the root of the cgroup2 mount that holds dir.
// proc_pid_mountinfo(5): "36 35 98:0 ROOT POINT options [fields] - TYPE source options".
func mountOf(info, dir string) (point, root string, err error) {
	for line := range strings.Lines(info) {
		fields := strings.Fields(line)
		dash := slices.Index(fields, "-")
		if dash < 6 || dash+1 >= len(fields) || fields[dash+1] != "cgroup2" {
			continue
		}
		p := unescape(fields[4])
		// The longest is the innermost; of two at one point the later hides the other.
		if Within(dir, p) && len(p) >= len(point) {
			point, root = p, unescape(fields[3])
		}
	}
	if point == "" {
		return "", "", fmt.Errorf("find cgroup2: %s is in no cgroup2 mount", dir)
	}
	return point, root, nil
}

// unescape undoes mountinfo's \040 and the like.
func unescape(s string) string {
	for i := 0; i+3 < len(s); i++ {
		if s[i] != '\\' {
			continue
		}
		if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
			s = s[:i] + string([]byte{byte(n)}) + s[i+4:]
		}
	}
	return s
}

// place says where path is when root is mounted at point.
func place(point, root, path string) (string, error) {
	if above(root) || above(path) {
		return "", ErrOutside
	}
	if !Within(path, root) {
		return "", fmt.Errorf("%s is not below %s, which is what %s shows: %w", path, root, point, ErrOutside)
	}
	rel, err := filepath.Rel(root, path)
	if err != nil {
		return "", err
	}
	return filepath.Join(point, rel), nil
}

func above(path string) bool { return path == "/.." || strings.HasPrefix(path, "/../") }
