package redirect_test

import (
	"testing"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

func TestHooksLoad(t *testing.T) {
	cg := netlab.MustCgroups(t, "pods", "proxy")
	h, err := redirect.OpenHooks(redirect.HooksConfig{CgroupRoot: cg[0].Path, Dir: netlab.MustBPFFS(t)})
	check(t, err)
	t.Cleanup(func() { h.Uninstall(); h.Close() })
	check(t, h.Proxy(cg[1].Path))
	pod := netlab.MustHost(t, "pod")
	check(t, h.Apply(pod.NS, redirect.PodRules{DNS: true}), h.Check(pod.NS, redirect.PodRules{DNS: true}), h.Remove(pod.NS))
}
