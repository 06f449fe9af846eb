package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"github.com/ambit-mesh/ambit/ebpf/cgroup"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// probeVerb prints what netlab.EBPF says, and nothing where all is well.
const probeVerb = "probe-ebpf"

func probe(w io.Writer) int {
	if err := netlab.EBPF(); err != nil {
		fmt.Fprintln(w, err)
	}
	return 0
}

// eBPF runs the probe in namespaces as each test binary has them.
func eBPF(self string) (why string, err error) {
	cmd := exec.Command(self, "exec", self, probeVerb)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("ask whether the kernel takes eBPF programs: %w", err)
	}
	if why = strings.TrimSpace(string(out)); why != "" && !strings.HasPrefix(why, netlab.NoEBPF) {
		return "", errors.New(why)
	}
	return why, nil
}

// sweep takes away the cgroups of test binaries that were killed: unlike namespaces
// they stay. Where the hierarchy is not mounted the next test that needs it does so.
func sweep() {
	mount, err := cgroup.Mount()
	if err != nil {
		return
	}
	if dir, err := cgroup.OfProcess(os.Getpid(), mount); err == nil {
		netlab.SweepCgroups(dir)
	}
}
