package netlab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// NoEBPF begins what tests say that the machine's kernel takes no programs from.
// cmd/ambit-test knows it: where EBPF agrees, such a skip is no failure.
const NoEBPF = "eBPF not available: "

// EBPF does once, in small, what a node agent does: a cgroup2 directory, a program
// attached to it, its link pinned on a BPF file system. Nil means that all of it
// works, anything else says what does not. Nothing of it stays.
//
// Programs of later kernels are not tried: where only they are missing, the agent's
// own word counts.
var EBPF = sync.OnceValue(func() error {
	if err := probeEBPF(); err != nil {
		return fmt.Errorf("%s%w", NoEBPF, err)
	}
	return nil
})

// RequireEBPF skips the test where EBPF fails.
func RequireEBPF(t TB) {
	t.Helper()
	if err := EBPF(); err != nil {
		t.Skipf("%v", err)
	}
}

func probeEBPF() error {
	if b, err := os.ReadFile("/proc/self/uid_map"); os.Geteuid() != 0 || err == nil && strings.Fields(string(b))[2] != "4294967295" {
		return errors.New("the kernel takes programs from root alone")
	}
	dir, err := os.MkdirTemp("", "ebpf-probe-")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	cgroup, unmount, err := probeCgroup(dir)
	if err != nil {
		return err
	}
	defer unmount()
	// cgroup/connect4 that lets everything pass.
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "Apache-2.0",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		return fmt.Errorf("load a program: %w", err)
	}
	defer p.Close()
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupInet4Connect, Program: p})
	if err != nil {
		return fmt.Errorf("attach a program to a cgroup: %w", err)
	}
	defer l.Close()
	// The same place serves: the cgroup is known by its link now.
	if err := unix.Mount("bpffs", dir, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount a BPF file system: %w", err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }() // with all that is pinned there
	if err := l.Pin(filepath.Join(dir, "link")); err != nil {
		return fmt.Errorf("pin a program's link: %w", err)
	}
	return nil
}

// probeCgroup makes a cgroup below the process's own.
func probeCgroup(mount string) (dir string, remove func(), err error) {
	if dir, err = MountCgroup2(mount); err != nil {
		return "", nil, err
	}
	unmount := func() { _ = unix.Unmount(mount, unix.MNT_DETACH) } // of this probe alone
	// Process ids are no names here: several namespaces of them share the hierarchy.
	if dir, err = os.MkdirTemp(dir, "ambit-probe-"); err != nil {
		unmount()
		return "", nil, fmt.Errorf("make a cgroup: %w", err)
	}
	return dir, func() {
		_ = os.Remove(dir) // empty
		unmount()
	}, nil
}

// MountCgroup2 mounts the cgroup2 hierarchy (there is one, however often it is
// mounted) and returns the process's own directory in it.
func MountCgroup2(at string) (string, error) {
	place, err := own()
	if err != nil {
		return "", err
	}
	if err := unix.Mount("none", at, "cgroup2", 0, ""); err != nil {
		return "", fmt.Errorf("mount cgroup2: %w", err)
	}
	return filepath.Join(at, place), nil
}

// own is the process's place in the cgroup2 hierarchy.
func own() (string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if ok && strings.HasPrefix(path, "/..") {
			return "", fmt.Errorf("the own cgroup %s is not in the own cgroup namespace", path)
		}
		if ok {
			return strings.TrimSuffix(path, " (deleted)"), nil
		}
	}
	return "", errors.New("the kernel has no cgroup2 hierarchy (/proc/self/cgroup)")
}
