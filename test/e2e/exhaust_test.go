package e2e

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// pid is a component's process, as the lab's own commands see it.
func (l *lab) pid(component string) int {
	l.t.Helper()
	for _, c := range l.status().Components {
		if c.Name == component && c.Pid > 0 {
			return c.Pid
		}
	}
	l.t.Fatalf("%s does not run", component)
	return 0
}

// descriptors counts what a component's process has open.
func (l *lab) descriptors(component string) int {
	l.t.Helper()
	out := l.must("exec", "node-1", "--", "sh", "-c", fmt.Sprintf("ls /proc/%d/fd | wc -l", l.pid(component)))
	n, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		l.t.Fatal(err)
	}
	return n
}

// A proxy that runs out of descriptors refuses what it cannot take, changes no
// byte of what it has, and is well again when descriptors are.
func TestProxyOutOfDescriptors(t *testing.T) {
	l := enrolPair(t, either)
	far := l.ip("far") + ":9000"
	for _, c := range []string{"ztunnel@node-1", "ztunnel@node-2"} {
		l.must("wait", "--timeout", "110s")
		pid := strconv.Itoa(l.pid(c))
		old := strings.Fields(l.must("exec", "node-1", "--", "prlimit", "--pid", pid, "--nofile", "--noheadings", "--output", "SOFT"))[0]
		done := l.soak(6*time.Second, "--conns", "4", "--max", "100000", far)
		l.must("exec", "node-1", "--", "prlimit", "--pid", pid, fmt.Sprintf("--nofile=%d:", l.descriptors(c)+10))
		l.try("", "exec", "client", "--", "ambit-sample", "load", "--fresh", "--conns", "64", "--for", "3s", far) // what is refused is no failure
		l.must("exec", "node-1", "--", "prlimit", "--pid", pid, "--nofile="+old+":")
		if a := <-done; a.s.Wrong > 0 || a.s.Complete == 0 {
			t.Errorf("%s out of descriptors: %+v %s", c, a.s, a.r.err)
		}
		if again := strconv.Itoa(l.pid(c)); again != pid {
			t.Errorf("%s ended for want of descriptors", c)
		}
		l.until("the proxy is well again", func() (bool, string) {
			a := <-l.soak(time.Second, "--conns", "4", far)
			return a.s.Complete > 0 && a.s.Broken+a.s.Wrong == 0, fmt.Sprintf("%+v", a.s)
		})
	}
}

// An idle connection costs a proxy one descriptor, its tunnel one for every
// hundred: the budget is n + n/100 + 200, 10,300 for ten thousand connections.
// AMBIT_IDLE=10000 tests that number.
func TestIdleConnections(t *testing.T) {
	n := 1000
	if s := os.Getenv("AMBIT_IDLE"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	l := enrolPair(t, either)
	before := l.descriptors("ztunnel@node-1")
	done := make(chan result, 1)
	go func() {
		done <- l.try("", "exec", "client", "--", "ambit-sample", "hold", "--n", strconv.Itoa(n), "--for", "6s", l.ip("far")+":9000")
	}()
	l.until("the connections are open", func() (bool, string) {
		have := l.descriptors("ztunnel@node-1")
		return have >= before+n, fmt.Sprint(have, " descriptors")
	})
	for _, c := range []string{"ztunnel@node-1", "ztunnel@node-2"} {
		have, budget := l.descriptors(c), n+n/100+200
		rss := l.must("exec", "node-1", "--", "sh", "-c", fmt.Sprintf("grep VmRSS /proc/%d/status", l.pid(c)))
		t.Logf("%s: %d descriptors for %d connections, %s", c, have, n, strings.TrimSpace(rss))
		if have > budget {
			t.Errorf("%s has %d descriptors for %d idle connections, want at most %d", c, have, n, budget)
		}
	}
	r := <-done
	if !strings.Contains(r.out, fmt.Sprintf(`{"open":%d}`, n)) || !strings.Contains(r.out, fmt.Sprintf(`{"kept":%d}`, n)) {
		t.Errorf("idle connections: %s%s", r.out, r.err)
	}
	l.until("descriptors come back", func() (bool, string) {
		have := l.descriptors("ztunnel@node-1")
		return have < before+n/10, fmt.Sprint(have, " descriptors")
	})
}
