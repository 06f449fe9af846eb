package netlab

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// Cgroup is a cgroup2 directory. The kernel's programs know a socket by the cgroup
// of the thread that made it, so Do stands for "a process of that cgroup".
type Cgroup struct {
	Path string
	home string // where its threads come from
}

// MustCgroups makes a cgroup for each name, beside each other, ended by the test.
// The process is in their parent meanwhile, so two tests with cgroups must not run
// at the same time in one process.
func MustCgroups(t TB, names ...string) []*Cgroup {
	t.Helper()
	Require(t)
	RequireEBPF(t)
	mount, err := os.MkdirTemp("", "cgroup2-")
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() { _ = os.Remove(mount) })
	before, err := MountCgroup2(mount)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(mount, unix.MNT_DETACH) })
	SweepCgroups(before)
	parent := filepath.Join(before, testCgroup(os.Getpid()))
	var out []*Cgroup
	dirs := []string{parent}
	for _, name := range names {
		dirs = append(dirs, filepath.Join(parent, name))
	}
	for i, dir := range dirs {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatalf("%v", err)
		}
		t.Cleanup(func() { _ = os.Remove(dir) })
		if i == 0 {
			if err := join(dir, "cgroup.procs", os.Getpid()); err != nil {
				t.Fatalf("%v", err)
			}
			t.Cleanup(func() { _ = join(before, "cgroup.procs", os.Getpid()) })
			continue
		}
		// Threads of one process can be in several cgroups only if these are threaded.
		if err := os.WriteFile(filepath.Join(dir, "cgroup.type"), []byte("threaded"), 0o644); err != nil {
			t.Fatalf("%v", err)
		}
		out = append(out, &Cgroup{Path: dir, home: parent})
	}
	return out
}

func join(dir, file string, id int) error {
	return os.WriteFile(filepath.Join(dir, file), []byte(strconv.Itoa(id)), 0o644)
}

// Do runs f on a thread inside c. f must not start goroutines that make sockets.
func (c *Cgroup) Do(f func() error) error {
	donec := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := join(c.Path, "cgroup.threads", unix.Gettid()); err != nil {
			donec <- err
			return // the thread ends
		}
		err := f()
		if herr := join(c.home, "cgroup.threads", unix.Gettid()); herr != nil {
			donec <- herr
			return
		}
		runtime.UnlockOSThread()
		donec <- err
	}()
	return <-donec
}

// MustBPFFS mounts a BPF file system for the test.
func MustBPFFS(t TB) string {
	t.Helper()
	RequireEBPF(t)
	dir, err := os.MkdirTemp("", "bpffs-")
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() { _ = os.Remove(dir) })
	if err := unix.Mount("bpffs", dir, "bpf", 0, "mode=0700"); err != nil {
		t.Fatalf("mount a BPF file system: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}
