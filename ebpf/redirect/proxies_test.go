package redirect_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestHooksHandOverBetweenProxies has the listener of one proxy followed by another's.
func TestHooksHandOverBetweenProxies(t *testing.T) {
	s := newStage(t)
	s.enrol(t)
	want := func(when, line string) {
		t.Helper()
		for range 8 {
			c, err := connect(s.app, s.pod.NS, netip.MustParseAddrPort("10.9.0.2:8080"), nil)
			if name, _, _ := strings.Cut(c.line, " "); err != nil || name != line {
				t.Errorf("%s: answered %q, %v, want %q", when, c.line, err, line)
			}
		}
	}
	old := listen(t, s.proxy, s.pod.NS, "[::]:15001", proxyOptions)
	answer(t, old, "old")
	want("one proxy", "old")
	next := listen(t, s.proxy, s.pod.NS, "[::]:15001", proxyOptions)
	answer(t, next, "next")
	want("both listen", "next")
	old.Close()
	want("the old one is gone", "next")
	next.Close()
	if c, err := connect(s.app, s.pod.NS, netip.MustParseAddrPort("10.9.0.2:8080"), nil); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("both are gone: answered %q, %v, want ECONNREFUSED", c.line, err)
	}
}
