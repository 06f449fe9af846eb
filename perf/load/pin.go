package load

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// Where a pinned client and server are: on two CPUs, so that bytes always cross
// from one to the other. Left alone the scheduler puts both on one CPU or on two as
// it likes, and a round trip takes a third of the time on one: a coin that is
// tossed for each connection.
const (
	clientCPU = 0
	serverCPU = 1
)

// serverName is that of the server among the processes that are measured.
const serverName = "server"

// pinned puts this process and the server on their CPUs; what it returns lets the
// server go, which outlives the load.
func pinned(watch []Process) (restore func(), err error) {
	if runtime.NumCPU() < 2 {
		return nil, errors.New("pin client and server: there is one CPU")
	}
	var was unix.CPUSet
	if err := unix.SchedGetaffinity(0, &was); err != nil {
		return nil, os.NewSyscallError("sched_getaffinity", err)
	}
	if err := pin(os.Getpid(), only(clientCPU)); err != nil {
		return nil, err
	}
	for _, p := range watch {
		if p.Name != serverName {
			continue
		}
		if err := pin(p.PID, only(serverCPU)); err != nil {
			return nil, err
		}
		return func() { _ = pin(p.PID, was) }, nil // one that is gone needs it no more
	}
	return nil, errors.New("pin client and server: the server is not known")
}

func only(cpu int) (s unix.CPUSet) {
	s.Set(cpu)
	return s
}

// pin moves all threads of a process. Those that it starts later are where the
// thread is that starts them.
func pin(pid int, to unix.CPUSet) error {
	tasks, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "task"))
	if err != nil {
		return fmt.Errorf("pin process %d: %w", pid, err)
	}
	for _, task := range tasks {
		tid, err := strconv.Atoi(task.Name())
		if err != nil {
			return fmt.Errorf("pin process %d: %w", pid, err)
		}
		if err := unix.SchedSetaffinity(tid, &to); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("pin process %d: %w", pid, os.NewSyscallError("sched_setaffinity", err))
		}
	}
	return nil
}
