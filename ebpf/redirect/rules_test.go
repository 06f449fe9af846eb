package redirect_test

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// What only rules have to do with: conntrack, the kernel's parts, configuration.

func TestRulesRememberHalfClosed(t *testing.T) {
	s := newRulesStage(t)
	s.enrol(t)
	for _, state := range []string{"close_wait", "fin_wait"} {
		var seconds []byte
		check(t, s.pod.NS.Do(func() (err error) {
			seconds, err = os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_" + state)
			return err
		}))
		if got := strings.TrimSpace(string(seconds)); got != "3600" {
			t.Errorf("%s: %s seconds, want an hour", state, got)
		}
	}
}

func TestRulesNameMissingIPv6(t *testing.T) {
	netlab.Require(t)
	if !netlab.IPv6() {
		t.Skip("kernel without IPv6")
	}
	pod := netlab.MustHost(t, "pod")
	check(t, pod.Sysctl("net/ipv6/conf/lo/disable_ipv6", "1"))
	d, err := redirect.New(redirect.Config{})
	check(t, err)
	err = d.Apply(pod.NS, redirect.PodRules{IPv6: true})
	if uerr, ok := errors.AsType[*redirect.UnsupportedError](err); !ok {
		t.Errorf("Apply with IPv6 off: %v, want an UnsupportedError", err)
	} else if uerr.Feature == "" {
		t.Error("the error names no feature")
	}
	check(t, d.Apply(pod.NS, redirect.PodRules{}), d.Check(pod.NS, redirect.PodRules{}))
}

func TestRulesConfigIsChecked(t *testing.T) {
	if _, err := redirect.New(redirect.Config{ProbeV4: podV6}); err == nil {
		t.Error("an IPv6 address was taken for IPv4")
	}
}

func BenchmarkRulesApplyUnchanged(b *testing.B) {
	pod := netlab.MustHost(b, "pod")
	d, err := redirect.New(redirect.Config{})
	check(b, err)
	for b.Loop() {
		check(b, d.Apply(pod.NS, redirect.PodRules{}))
	}
}
