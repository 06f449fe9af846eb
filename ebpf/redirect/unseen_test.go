package redirect_test

import (
	"errors"
	"net/netip"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// addLink makes a link in the pod, as a sandboxed runtime does.
func addLink(t *testing.T, h *netlab.Host, l netlink.Link) {
	t.Helper()
	check(t, h.NS.Do(func() error { return netlink.LinkAdd(l) }))
}

func linkNamed(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

func requireTun(t *testing.T) {
	t.Helper()
	if err := unix.Access("/dev/net/tun", unix.W_OK); err != nil {
		t.Skipf("needs /dev/net/tun: %v", err)
	}
}

func TestUnseenPodsAreRefused(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		for _, tc := range []struct {
			name, reason string
			prepare      func(t *testing.T, h *netlab.Host)
		}{
			{"a virtual machine by tap", "tap0_kata (tap) belongs to a virtual machine", func(t *testing.T, h *netlab.Host) {
				requireTun(t)
				addLink(t, h, &netlink.Tuntap{LinkAttrs: linkNamed("tap0_kata"), Mode: netlink.TUNTAP_MODE_TAP})
			}},
			{"a virtual machine by macvtap", "(macvtap) belongs to a virtual machine", func(t *testing.T, h *netlab.Host) {
				var parent netlink.Link
				check(t, h.NS.Do(func() (err error) { parent, err = netlink.LinkByName("eth0"); return err }))
				a := linkNamed("vm0")
				a.ParentIndex = parent.Attrs().Index
				err := h.NS.Do(func() error {
					return netlink.LinkAdd(&netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: a, Mode: netlink.MACVLAN_MODE_BRIDGE}})
				})
				if errors.Is(err, syscall.EOPNOTSUPP) {
					t.Skip("this kernel has no macvtap")
				}
				check(t, err)
			}},
			{"a stack of its own", "no address", func(t *testing.T, h *netlab.Host) {
				check(t, h.NS.Do(func() error {
					l, err := netlink.LinkByName("eth0")
					if err != nil {
						return err
					}
					addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
					for _, a := range addrs {
						err = errors.Join(err, netlink.AddrDel(l, &a))
					}
					return err
				}))
			}},
		} {
			t.Run(tc.name, func(t *testing.T) {
				h := netlab.MustHost(t, "sandbox")
				check(t, netlab.Cable(h, "eth0", s.node, "sandbox"), h.Up("eth0"), s.node.Up("sandbox"),
					h.Addr("eth0", netip.MustParsePrefix("10.6.0.2/24")))
				t.Cleanup(func() { _ = s.node.Unplug("sandbox") })
				tc.prepare(t, h)
				err := s.redirector.Apply(h.NS, redirect.PodRules{})
				if _, ok := errors.AsType[*redirect.UnseenError](err); !ok || !strings.Contains(err.Error(), tc.reason) {
					t.Errorf("Apply: %v, want a refusal with %q", err, tc.reason)
				}
				if present, err := s.redirector.Present(h.NS); err != nil || present {
					t.Errorf("redirection of a pod that was refused is present: %t, %v", present, err)
				}
			})
		}
		// What is captured stays so, whatever it makes.
		s.enrol(t)
		requireTun(t)
		addLink(t, s.pod, &netlink.Tuntap{LinkAttrs: linkNamed("tap0"), Mode: netlink.TUNTAP_MODE_TAP})
		check(t, s.redirector.Apply(s.pod.NS, everything), s.redirector.Check(s.pod.NS, everything))
	})
}

// TestPodsOutsideTheHooksAreRefused: no program is above the pod's processes. One
// that is makes it a pod, whoever else looks in.
func TestPodsOutsideTheHooksAreRefused(t *testing.T) {
	s := newStage(t)
	run := func(cg *netlab.Cgroup) {
		t.Helper()
		cmd := exec.Command("sleep", "60")
		check(t, in(cg, s.pod.NS, cmd.Start))
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	}
	run(s.host)
	err := s.hooks.Apply(s.pod.NS, everything)
	if _, ok := errors.AsType[*redirect.UnseenError](err); !ok || !strings.Contains(err.Error(), "--cgroup-root") || !strings.Contains(err.Error(), "sleep") {
		t.Errorf("Apply: %v, want a refusal with the process and the root", err)
	}
	run(s.app)
	s.enrol(t)
}

// TestTunnelsThatAreDown: with their modules loaded, kernels give every namespace
// devices that no packet gate could stand at.
func TestTunnelsThatAreDown(t *testing.T) {
	s := newStage(t)
	addLink(t, s.pod, &netlink.Tuntap{LinkAttrs: linkNamed("tunl0"), Mode: netlink.TUNTAP_MODE_TUN})
	s.enrol(t)
}
