package netlab_test

import (
	"os"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/test/netlab"
)

func TestProbeOfEBPFLeavesNothing(t *testing.T) {
	netlab.Require(t)
	err := netlab.EBPF()
	if err != nil && !strings.HasPrefix(err.Error(), netlab.NoEBPF) {
		t.Errorf("the probe says %q without %q", err, netlab.NoEBPF)
	}
	mounts, rerr := os.ReadFile("/proc/self/mounts")
	must(t, rerr)
	if strings.Contains(string(mounts), "ebpf-probe-") {
		t.Errorf("the probe left a mount:\n%s", mounts)
	}
}
