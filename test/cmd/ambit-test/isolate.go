package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// stageEnv marks the second run of this program, inside the new namespaces.
const stageEnv = "AMBIT_TEST_ISOLATED"

// isolate runs a test binary in namespaces of its own. Where the machine allows
// none, it runs the binary as it is and the tests say what they miss.
func isolate(argv []string) int {
	if os.Getenv(stageEnv) != "" {
		return inside(argv)
	}
	for _, user := range []bool{false, true} {
		code, err := reexec(argv, user)
		if err == nil {
			return code
		}
	}
	return start(exec.Command(argv[0], argv[1:]...))
}

// reexec starts this program again inside new namespaces. The error says that
// they could not be made; the code is the test binary's.
func reexec(argv []string, user bool) (int, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(self, append([]string{"exec"}, argv...)...)
	cmd.Env = append(os.Environ(), stageEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	if user {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	return exitCode(cmd.Wait()), nil
}

// inside prepares the namespaces as tests expect them and becomes the test.
func inside(argv []string) int {
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "ambit-test: prepare namespaces:", err)
	}
	os.Unsetenv(stageEnv)
	if err := syscall.Exec(argv[0], argv, os.Environ()); err != nil {
		fmt.Fprintf(os.Stderr, "ambit-test: run %s: %v\n", argv[0], err)
	}
	return 2
}

func prepare() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bring up loopback: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// /sys shows the network namespace it was mounted in; a fresh one is a
	// convenience, and in some containers it is forbidden.
	_ = unix.Mount("sysfs", "/sys", "sysfs", 0, "")
	return nil
}

func start(cmd *exec.Cmd) int {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return exitCode(cmd.Run())
}

func exitCode(err error) int {
	if err == nil {
		return 0
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() >= 0 {
		return exit.ExitCode()
	}
	return 2
}
