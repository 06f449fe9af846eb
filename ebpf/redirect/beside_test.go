package redirect_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// Programs of others at the hooks that the mesh uses.

// foreign is a program that always returns verdict.
func foreign(t *testing.T, kind ebpf.ProgramType, at ebpf.AttachType, verdict int32) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "stranger", Type: kind, AttachType: at, License: "Apache-2.0",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()},
	})
	check(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}

// TestHooksBesideExclusivePrograms finds a program attached as in the days before
// several could be.
func TestHooksBesideExclusivePrograms(t *testing.T) {
	s := quietStage(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "client")
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	for _, tc := range []struct {
		name      string
		flags     uint32
		above     bool
		refused   bool
		obstacles string
	}{
		{name: "alone at the root", refused: true},
		{name: "alone above the root", above: true, refused: true},
		{name: "overridable at the root", flags: unix.BPF_F_ALLOW_OVERRIDE, refused: true},
		{name: "overridable above the root", flags: unix.BPF_F_ALLOW_OVERRIDE, above: true, obstacles: "does not run for pods"},
		{name: "one of several at the root", flags: unix.BPF_F_ALLOW_MULTI, obstacles: "runs before the mesh's"},
		{name: "one of several above the root", flags: unix.BPF_F_ALLOW_MULTI, above: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			where := s.app.Path
			if tc.above {
				where = parent(where)
			}
			dir, err := os.Open(where)
			check(t, err)
			defer dir.Close()
			p := foreign(t, ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, 1)
			at := ebpf.AttachCGroupInet4Connect
			check(t, link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: at, Flags: tc.flags}))
			defer func() {
				check(t, link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: at}))
			}()
			h, err := redirect.OpenHooks(s.cfg)
			if tc.refused {
				o, ok := errors.AsType[*redirect.ObstacleError](err)
				if !ok || o.Cgroup != where || len(o.Programs) != 1 || !strings.Contains(err.Error(), "program stranger (") || !strings.Contains(err.Error(), "--redirect=nftables") {
					t.Errorf("open: %v, want an obstacle at %s", err, where)
				}
				return
			}
			check(t, err)
			s.hooks, s.redirector = h, h
			defer func() { check(t, h.Uninstall(), h.Close()) }()
			found, err := h.Obstacles()
			check(t, err)
			if (tc.obstacles == "") != (len(found) == 0) || tc.obstacles != "" && !strings.Contains(found[0], tc.obstacles) {
				t.Errorf("obstacles are %q, want %q", found, tc.obstacles)
			}
			check(t, h.Proxy(s.proxy.Path))
			s.enrol(t)
			stop := s.listenProxy(t) // after the hooks know it
			defer stop()
			s.wantCaptured(t, "beside the stranger")
		})
	}
}

// TestHooksBesideLookups has a foreign sk_lookup program in the pod.
func TestHooksBesideLookups(t *testing.T) {
	const drop, pass = 0, 1
	s := newStage(t)
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	for _, before := range []bool{true, false} {
		for name, verdict := range map[string]int32{"drops": drop, "passes": pass} {
			t.Run(fmt.Sprintf("%s, attached before %t", name, before), func(t *testing.T) {
				defer func() { check(t, s.hooks.Remove(s.pod.NS)) }()
				p := foreign(t, ebpf.SkLookup, ebpf.AttachSkLookup, verdict)
				attach := func() {
					var l *link.NetNsLink
					var err error
					cerr := s.pod.NS.Control(func(fd int) { l, err = link.AttachNetNs(fd, p) })
					check(t, cerr, err)
					t.Cleanup(func() { l.Close() })
				}
				if before {
					attach()
				}
				stop := s.listenProxy(t)
				s.enrol(t)
				if !before {
					attach()
				}
				s.wantCaptured(t, "beside the stranger")
				found, err := s.hooks.PodObstacles(s.pod.NS)
				check(t, err)
				if len(found) != 1 || !strings.Contains(found[0], "program stranger (") {
					t.Errorf("obstacles are %q, want the stranger", found)
				}
				stop()
				if c, err := connect(s.app, s.client.NS, at(podV4, 8080), nil); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("without the proxy: answered %q, %v, want ECONNREFUSED", c.line, err)
				}
			})
		}
	}
}

// TestHooksBesidePacketPrograms has foreign programs at both ends of the pod's cable.
func TestHooksBesidePacketPrograms(t *testing.T) {
	const next, pass, drop = -1, 0, 2
	s := newStage(t)
	w := s.watch(t)
	s.listenProxy(t)
	for i, tc := range []struct {
		name    string
		when    string // "before": ours come; "behind" or "ahead" of ours, later
		verdict int32
		named   bool // as an obstacle at each end
		leaks   bool // which is why
	}{
		{name: "asks the next one", when: "before", verdict: next},
		{name: "passes", when: "before", verdict: pass},
		{name: "passes", when: "behind", verdict: pass},
		{name: "asks the next one", when: "ahead", verdict: next, named: true},
		{name: "passes", when: "ahead", verdict: pass, named: true, leaks: true},
		{name: "drops", when: "behind", verdict: drop},
		{name: "drops", when: "ahead", verdict: drop, named: true},
	} {
		t.Run(tc.name+" "+tc.when, func(t *testing.T) {
			defer func() { check(t, s.hooks.Remove(s.pod.NS)) }()
			attach := func() {
				for _, end := range []struct {
					ns   *netns.NS
					name string
					at   ebpf.AttachType
				}{{s.pod.NS, "eth0", ebpf.AttachTCXEgress}, {s.node.NS, "pod", ebpf.AttachTCXIngress}} {
					anchor := link.Tail()
					if tc.when == "ahead" {
						anchor = link.Head()
					}
					p := foreign(t, ebpf.SchedCLS, end.at, tc.verdict)
					check(t, end.ns.Do(func() error {
						i, err := net.InterfaceByName(end.name)
						if err != nil {
							return err
						}
						l, err := link.AttachTCX(link.TCXOptions{Interface: i.Index, Program: p, Attach: end.at, Anchor: anchor})
						if err == nil {
							t.Cleanup(func() { l.Close() })
						}
						return err
					}))
				}
			}
			if tc.when == "before" {
				attach()
			}
			s.enrol(t)
			if tc.when != "before" {
				attach()
			}
			found, err := s.hooks.PodObstacles(s.pod.NS)
			check(t, err)
			if want := map[bool]int{true: 2}[tc.named]; len(found) != want {
				t.Errorf("obstacles are %q, want %d", found, want)
			}
			if tc.verdict == drop {
				return // nothing leaves the pod at all
			}
			s.wantCaptured(t, "beside the strangers")
			mark := []byte{0x77, 0xed, 0, byte(i)}
			f := frame{bytes: ether(unix.ETH_P_IP, ip4(podV4, clientV4, 6, 0, syn(mark)))}
			check(t, contained(s.app, s.pod.NS, func() error { return both(f.send(w, mark), w.last(mark)) }))
			if arrived, err := w.saw(mark); err != nil || arrived != tc.leaks {
				t.Errorf("a SYN of its own arrived: %t, %v, want %t", arrived, err, tc.leaks)
			}
		})
	}
}
