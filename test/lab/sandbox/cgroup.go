package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/test/netlab"
)

// SweepVerb is the second run that takes away the cgroups of labs that are gone.
const SweepVerb = "sandbox-sweep"

// A lab's processes have a cgroup of their own below that of whoever started the
// lab, named after the lab and, as the machine counts, its first process:
//
//	ambit-lab-NAME-PID/lab                                the lab itself
//	ambit-lab-NAME-PID/NODE/pods/NAMESPACE_POD/CONTAINER  what runs in pods
//	ambit-lab-NAME-PID/NODE/node                          what runs on the node
//
// Unlike everything else here a cgroup outlives its processes, empty. The next
// command that starts or ends a lab removes it: see Sweep.
const (
	cgroupPrefix = "ambit-lab-"
	cgroupMount  = RunDir + "/cgroup2"
	cgroupFile   = RunDir + "/cgroup" // what makeCgroup found
)

// Cgroup is the directory of the lab's cgroup, "" without one. For the daemon.
func Cgroup() string { return read(cgroupFile) }

// PodsCgroup is the directory above the cgroups of a node's pods, as kubepods is.
// The mesh's own programs are such pods too. Empty without cgroups.
func PodsCgroup(node string) string { return below(node, "pods") }

// NodeCgroup is where processes of the node itself are. Empty without cgroups.
func NodeCgroup(node string) string { return below(node, "node") }

func below(elem ...string) string {
	dir := Cgroup()
	if dir == "" {
		return ""
	}
	return filepath.Join(append([]string{dir}, elem...)...)
}

// hostPid is the process's number as the machine counts. To be called while /proc
// is still the machine's.
func hostPid() int {
	link, err := os.Readlink("/proc/self")
	if err != nil {
		return 0
	}
	pid, _ := strconv.Atoi(link) // 0 is nobody's
	return pid
}

// joinCgroup makes the lab's cgroup and moves the process into it. A machine
// without cgroup2 or without root's rights has labs without cgroups.
func joinCgroup(name string, pid int) error {
	if err := os.MkdirAll(cgroupMount, 0o755); err != nil {
		return err
	}
	place, err := netlab.MountCgroup2(cgroupMount)
	if err != nil {
		return err
	}
	dir := filepath.Join(place, fmt.Sprintf("%s%s-%d", cgroupPrefix, cgroupName(name), pid))
	lab := filepath.Join(dir, "lab")
	if err := os.MkdirAll(lab, 0o755); err != nil {
		return fmt.Errorf("make the lab's cgroup: %w", err)
	}
	// 0 is who writes it.
	if err := os.WriteFile(filepath.Join(lab, "cgroup.procs"), []byte("0"), 0o644); err != nil {
		return fmt.Errorf("join the lab's cgroup: %w", err)
	}
	return os.WriteFile(cgroupFile, []byte(dir), 0o644)
}

// cgroupName keeps of a lab's name what a directory's can be made of.
func cgroupName(lab string) string {
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' || r == '_' || r == '-' {
			return r
		}
		return '_'
	}, lab)
}

// Sweep removes the empty cgroups of labs whose first process is dead. It waits a
// moment for the lab of that name, which may just be ending.
func Sweep(name string) error {
	if os.Geteuid() != 0 {
		return nil // such labs have none
	}
	var out bytes.Buffer
	cmd := exec.Command("/proc/self/exe", SweepVerb, name)
	cmd.Args[0] = "ambit-lab"
	cmd.Stderr = &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	err := cmd.Run()
	if errors.Is(err, syscall.EPERM) {
		return nil // root in a container that may make no namespaces: no labs either
	}
	if err != nil {
		return fmt.Errorf("remove cgroups of labs that are gone: %w: %s", err, bytes.TrimSpace(out.Bytes()))
	}
	return nil
}

// sweepPatience is how long the processes of a lab that ends may take.
const sweepPatience = 20 * time.Second

// SweepMain is Sweep's second run, with mounts of its own: whether and where the
// machine has the hierarchy mounted does not matter.
func SweepMain(name string) int {
	err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if err == nil {
		const at = "/tmp" // any directory does
		if _, merr := netlab.MountCgroup2(at); merr != nil {
			return 0 // no hierarchy, no cgroups
		}
		err = sweep(at, name)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func sweep(root, name string) error {
	for deadline := time.Now().Add(sweepPatience); ; {
		ending, err := sweepOnce(root, cgroupName(name))
		if err != nil || !ending || time.Now().After(deadline) {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// sweepOnce reports whether the lab of that name is dead or dying and has a cgroup
// that is not empty yet.
func sweepOnce(root, name string) (ending bool, err error) {
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err != nil || !d.IsDir() {
			return err
		}
		rest, ours := strings.CutPrefix(d.Name(), cgroupPrefix)
		i := strings.LastIndexByte(rest, '-')
		if !ours || i < 0 {
			return nil
		}
		pid, err := strconv.Atoi(rest[i+1:])
		if err != nil {
			return nil // somebody else's
		}
		switch {
		case alive(pid):
		case populated(path):
			ending = ending || rest[:i] == name
		default:
			if err := removeTree(path); err != nil && !errors.Is(err, syscall.EBUSY) {
				return err
			}
		}
		return fs.SkipDir
	})
	return ending, err
}

// alive reports whether a process runs; one that is dead and waited for by nobody
// does not.
func alive(pid int) bool {
	stat := read(fmt.Sprintf("/proc/%d/stat", pid))
	_, after, ok := strings.Cut(stat, ") ") // proc_pid_stat(5): the name in parentheses, then the state
	return ok && !strings.HasPrefix(after, "Z") && !strings.HasPrefix(after, "X")
}

func populated(cgroup string) bool {
	return strings.Contains(read(filepath.Join(cgroup, "cgroup.events")), "populated 1")
}

// removeTree removes a directory of cgroups from its leaves up.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return syscall.Rmdir(dir)
}
