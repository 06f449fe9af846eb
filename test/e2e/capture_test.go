package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// start is a SYN that was seen, as `capture -o json` counts them.
type start struct {
	Where, Link string
	Src, Dst    netip.Addr
	Port        uint16
	Count       int
}

// capture is a running one of all the lab's interfaces.
type capture struct {
	l   *lab
	cmd *exec.Cmd
	out *bufio.Reader
	err bytes.Buffer
}

// capture returns when every interface is watched.
func (l *lab) capture() *capture {
	l.t.Helper()
	c := &capture{l: l, cmd: exec.CommandContext(context.Background(), filepath.Join(bin, "ambit-lab"), "--name", l.name, "capture", "-o", "json")}
	c.cmd.Stderr = &c.err
	out, err := c.cmd.StdoutPipe()
	if err == nil {
		err = c.cmd.Start()
	}
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = c.cmd.Process.Kill() }) // one that ended by itself is no matter
	c.out = bufio.NewReader(out)
	if line, err := c.out.ReadString('\n'); err != nil || !strings.HasPrefix(line, "watching") {
		l.t.Fatalf("capture begins with %q, %v: %s", line, err, c.err.String())
	}
	return c
}

// stop returns all that was seen; a capture with gaps proves nothing.
func (c *capture) stop() []start {
	c.l.t.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGINT); err != nil {
		c.l.t.Fatal(err)
	}
	var got struct {
		Watched, Dropped int
		Starts           []start
	}
	if err := json.NewDecoder(c.out).Decode(&got); err != nil {
		c.l.t.Fatalf("capture: %v %s", err, c.err.String())
	}
	_ = c.cmd.Wait() // what it said is complete
	c.l.t.Logf("capture: %d namespaces, %d kinds of start, %d packets lost", got.Watched, len(got.Starts), got.Dropped)
	if got.Dropped > 0 {
		c.l.t.Errorf("the capture lost %d packets", got.Dropped)
	}
	return got.Starts
}

// ips are all addresses of a pod.
func (l *lab) ips(pod string) (all []netip.Addr) {
	l.t.Helper()
	var p struct {
		Status struct{ PodIPs []struct{ IP netip.Addr } }
	}
	l.decode(&p, "get", "pod", pod, "-o", "json")
	if len(p.Status.PodIPs) == 0 {
		l.t.Fatalf("pod %s has no address", pod)
	}
	for _, ip := range p.Status.PodIPs {
		all = append(all, ip.IP)
	}
	return all
}

// killTime is how long the schedule kills. AMBIT_KILLS=10m is what a release is
// tested with; the default keeps the test in every run.
func killTime(t *testing.T) time.Duration {
	s := os.Getenv("AMBIT_KILLS")
	if s == "" {
		return 20 * time.Second
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatalf("AMBIT_KILLS=%q: %v", s, err)
	}
	return d
}

const portHBONE = 15008

// leaks are the starts between the addresses that are not those of tunnels.
func leaks(seen []start, from, to []netip.Addr) (out []string, tunnels int) {
	in := func(a netip.Addr, set []netip.Addr) bool {
		for _, s := range set {
			if s == a {
				return true
			}
		}
		return false
	}
	for _, s := range seen {
		switch {
		case !in(s.Src, from) || !in(s.Dst, to):
		case s.Port == portHBONE:
			tunnels += s.Count
		default:
			out = append(out, fmt.Sprintf("%d x %s %s: %s -> %s", s.Count, s.Where, s.Link, s.Src, netip.AddrPortFrom(s.Dst, s.Port)))
		}
	}
	return out, tunnels
}

// control makes connections that have to be seen in clear text: from a pod outside
// the mesh to one inside, over IPv4, on each of the cables between.
func (l *lab) control(port uint16) func(seen []start) {
	l.t.Helper()
	src, dst := l.ips("plain")[0], l.ips("far")[0]
	l.until("a pod outside the mesh reaches one inside", func() (bool, string) {
		r := l.try("", "exec", "plain", "--", "ambit-sample", "call", fmt.Sprintf("tcp://%s", netip.AddrPortFrom(dst, port)))
		return r.code == 0, r.out + r.err
	})
	return func(seen []start) {
		links := map[string]bool{}
		for _, s := range seen {
			if s.Src == src && s.Dst == dst && s.Port == port {
				links[s.Where] = true
			}
		}
		for _, where := range []string{"default.plain", "node-1", "fabric", "node-2", "default.far"} {
			if !links[where] {
				l.t.Errorf("clear text from a pod outside the mesh to port %d was not seen in %s: the capture proves nothing", port, where)
			}
		}
	}
}
