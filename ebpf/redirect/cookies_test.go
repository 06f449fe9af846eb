package redirect_test

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSYNCookies has a pod that answers with cookies, as the kernel does by itself
// when a listener's queue is full: who a connection is for is then asked once more
// when the client believes it is established.
func TestSYNCookies(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		s.listenAll(t)
		s.enrol(t)
		check(t, s.pod.Sysctl("net/ipv4/tcp_syncookies", "2")) // always
		s.wantCaptured(t, "with cookies")
		for _, a := range families() {
			c, err := connect(s.proxy, s.pod.NS, at(a.pod, 8080), func(fd int) error {
				return errors.Join(asProxy(fd), unix.Bind(fd, sockaddr(at(a.client, 20000))))
			})
			if want := fmt.Sprintf("app %s %s", at(a.pod, 8080), a.client); err != nil || c.line != want {
				t.Errorf("the proxy's dial as %v was answered %q, %v, want %q", a.client, c.line, err, want)
			}
			to := at(a.pod, 8080)
			probe := flow{cg: s.host, ns: s.node.NS, to: to, line: fmt.Sprintf("app %s %s", to, s.nodeProbe(a.pod))}
			if err := s.flow(probe); err != nil {
				t.Errorf("the node's probe: %v", err)
			}
		}
	})
}
