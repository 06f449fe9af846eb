package load

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// syscalls counts the system calls of processes by a program that the kernel runs
// at each. /proc/PID/io would count only those of files, and a proxy that uses
// recv instead of read would seem to do without. It slows every call of every
// process down a little: what is counted is not what is measured.
type syscalls struct {
	counts  *ebpf.Map // process, in this one's namespace → calls
	program *ebpf.Program
	link    link.Link
}

func countSyscalls(watch []Process) (c *syscalls, err error) {
	c = &syscalls{}
	defer func() {
		if err != nil {
			err = fmt.Errorf("count system calls: %w", errors.Join(err, c.close()))
		}
	}()
	c.counts, err = ebpf.NewMap(&ebpf.MapSpec{Name: "perf_calls", Type: ebpf.Hash, KeySize: 4, ValueSize: 8, MaxEntries: uint32(len(watch) + 1)})
	if err != nil {
		return c, err
	}
	for _, p := range watch {
		if err := c.counts.Put(uint32(p.PID), uint64(0)); err != nil {
			return c, err
		}
	}
	// The kernel knows a namespace by the device and number of its file.
	var ns unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &ns); err != nil {
		return c, os.NewSyscallError("stat", err)
	}
	dev := uint64(unix.Major(ns.Dev))<<20 | uint64(unix.Minor(ns.Dev)) // as the kernel itself writes it
	c.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "perf_calls", Type: ebpf.RawTracepoint, License: "Apache-2.0",
		Instructions: asm.Instructions{
			// struct bpf_pidns_info { __u32 pid, tgid; } at -8: bpf-helpers(7)
			asm.LoadImm(asm.R1, int64(dev), asm.DWord),
			asm.LoadImm(asm.R2, int64(ns.Ino), asm.DWord),
			asm.Mov.Reg(asm.R3, asm.R10), asm.Add.Imm(asm.R3, -8),
			asm.Mov.Imm(asm.R4, 8),
			asm.FnGetNsCurrentPidTgid.Call(),
			asm.JNE.Imm(asm.R0, 0, "done"), // of another namespace
			asm.Mov.Reg(asm.R2, asm.R10), asm.Add.Imm(asm.R2, -4),
			asm.LoadMapPtr(asm.R1, c.counts.FD()),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "done"), // nobody's business
			asm.Mov.Imm(asm.R1, 1),
			asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
			asm.Mov.Imm(asm.R0, 0).WithSymbol("done"),
			asm.Return(),
		},
	})
	if err != nil {
		return c, err
	}
	c.link, err = link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sys_enter", Program: c.program})
	return c, err
}

// of returns the calls of a process so far; none where nobody counts.
func (c *syscalls) of(pid int) (n uint64, err error) {
	if c == nil {
		return 0, nil
	}
	if err := c.counts.Lookup(uint32(pid), &n); err != nil {
		return 0, fmt.Errorf("read system calls: %w", err)
	}
	return n, nil
}

func (c *syscalls) close() error {
	var errs []error
	if c.link != nil {
		errs = append(errs, c.link.Close())
	}
	if c.program != nil {
		errs = append(errs, c.program.Close())
	}
	if c.counts != nil {
		errs = append(errs, c.counts.Close())
	}
	return errors.Join(errs...)
}
