package app

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// TestAccessLogNamesWhoConnects: with programs the line of a connection says
// which process opened it, with rules it does not pretend to know; what its
// sockets met it says with both.
func TestAccessLogNamesWhoConnects(t *testing.T) {
	cg := netlab.MustCgroups(t, "pods", "proxy")
	procs := func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o644)
	}
	if err := procs(cg[1].Path); err != nil { // this process is the proxy
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = procs(filepath.Dir(cg[1].Path)) })
	w, a, b := twoPods(t)
	w.wantAnswer(a, fmt.Sprintf("%s:8080", b.ip), a.ip.String()+"\nhello")
	line := a.node.logs.want(t, "connection complete", `direction="outbound"`)
	if strings.Contains(line, "src.p") || strings.Contains(line, "src.cgroup") || !strings.Contains(line, " app.rtt_us=") || !strings.Contains(line, " net.rtt_us=") {
		t.Errorf("with rules: %s", line)
	}
	rules, err := redirect.New(redirect.Config{})
	w.check(err, rules.Remove(a.NS))
	h, err := redirect.OpenHooks(redirect.HooksConfig{CgroupRoot: cg[0].Path, Dir: netlab.MustBPFFS(t), Node: w.router.NS})
	w.check(err)
	t.Cleanup(func() { w.check(h.Uninstall(), h.Close()) })
	w.check(h.Proxy(cg[1].Path), h.Ready())
	// Listeners are known from when they are made: this is the proxy's restart.
	w.check(a.node.pods.DelPod("uid-a"))
	w.handOver(a)
	w.check(h.Apply(a.NS, redirect.PodRules{IPv6: w.v6}))

	var st unix.Stat_t
	w.check(unix.Stat(cg[0].Path, &st))
	exe, err := os.Executable()
	w.check(err)
	ask := func() error {
		errc := make(chan error, 1)
		go func() {
			runtime.LockOSThread() // ends with it: nothing is to be undone
			errc <- func() error {
				if err := os.WriteFile(filepath.Join(cg[0].Path, "cgroup.threads"), []byte(strconv.Itoa(unix.Gettid())), 0o644); err != nil {
					return err
				}
				if err := os.WriteFile("/proc/thread-self/comm", []byte("worker\n1"), 0o644); err != nil {
					return err
				}
				if err := unix.Setns(a.NS.FD(), unix.CLONE_NEWNET); err != nil {
					return err
				}
				d := net.Dialer{Timeout: waitLimit}
				d.SetMultipathTCP(false)
				c, err := d.Dial("tcp4", fmt.Sprintf("%s:8080", b.ip))
				if err != nil {
					return err
				}
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(waitLimit))
				if _, err := io.WriteString(c, "hello"); err != nil {
					return err
				}
				_ = c.(*net.TCPConn).CloseWrite()
				_, err = io.ReadAll(c)
				return err
			}()
		}()
		return <-errc
	}
	who := fmt.Sprintf("src.pid=%d", os.Getpid())
	names := []string{`src.process="` + filepath.Base(exe) + `"`, `src.process="worker?1"`}
	for i := 0; ; i++ {
		w.check(ask())
		line := a.node.logs.want(t, "connection complete", `direction="outbound"`, who, fmt.Sprintf("src.cgroup=%d", st.Ino), `dst.workload="b"`)
		if !strings.Contains(line, names[0]) && !strings.Contains(line, names[1]) {
			t.Fatalf("by programs: %s", line)
		}
		if strings.Contains(a.node.logs.text(), names[0]) {
			break // its executable is known by now
		}
		if i == 1000 {
			t.Fatalf("no line says %s", names[0])
		}
	}
}
