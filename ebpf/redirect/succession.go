package redirect

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/sockdiag"
)

// Redirector is what Dataplane and Hooks have in common.
type Redirector interface {
	Apply(ns *netns.NS, r PodRules) error
	Check(ns *netns.NS, r PodRules) error
	Release(ns *netns.NS) error
	Remove(ns *netns.NS) error
	Present(ns *netns.NS) (bool, error)
	Uncaptured(ns *netns.NS, r PodRules) (Uncaptured, error)
	Reset(ns *netns.NS, sockets []sockdiag.Socket) (int, error)

	// Yield ends the redirector's capture of ns, because another one's is in
	// force. What both need stays; so does what established connections need,
	// until a later call finds none of them left.
	Yield(ns *netns.NS) error
}

var (
	_ Redirector = (*Dataplane)(nil)
	_ Redirector = (*Hooks)(nil)
)

// Succession captures with Next what Former captured before: a pod has one of
// them in force at any time, and both for a moment.
type Succession struct{ Next, Former Redirector }

// Apply captures ns with Next and then no longer with Former.
func (s *Succession) Apply(ns *netns.NS, r PodRules) error {
	if err := s.Next.Apply(ns, r); err != nil {
		return err
	}
	return s.yield(ns)
}

// Check is Next's. It also ends what Former has kept for old connections, if they
// are gone.
func (s *Succession) Check(ns *netns.NS, r PodRules) error {
	if err := s.Next.Check(ns, r); err != nil {
		return err
	}
	return s.yield(ns)
}

func (s *Succession) yield(ns *netns.NS) error {
	if err := s.Former.Yield(ns); err != nil {
		return fmt.Errorf("end the former redirection: %w", err)
	}
	return nil
}

// Release ends both captures and keeps what established connections need.
func (s *Succession) Release(ns *netns.NS) error {
	return errors.Join(s.Next.Release(ns), s.Former.Release(ns))
}

// Remove takes both away. Doing it twice is no error.
func (s *Succession) Remove(ns *netns.NS) error {
	return errors.Join(s.Next.Remove(ns), s.Former.Remove(ns))
}

// Present reports whether ns has redirection of any sort.
func (s *Succession) Present(ns *netns.NS) (bool, error) {
	next, err := s.Next.Present(ns)
	if next || err != nil {
		return next, err
	}
	return s.Former.Present(ns)
}

// Uncaptured lists what neither captures.
func (s *Succession) Uncaptured(ns *netns.NS, r PodRules) (Uncaptured, error) {
	return s.Next.Uncaptured(ns, r)
}

// Reset is as a Dataplane's.
func (s *Succession) Reset(ns *netns.NS, sockets []sockdiag.Socket) (int, error) {
	return s.Next.Reset(ns, sockets)
}

// Waiting reports whether Former alone captures ns.
func (s *Succession) Waiting(ns *netns.NS) (bool, error) {
	next, err := s.Next.Present(ns)
	if next || err != nil {
		return false, err
	}
	return s.Former.Present(ns)
}

// Yield implements Redirector. Routes stay: all redirectors use them.
func (d *Dataplane) Yield(ns *netns.NS) error {
	present, err := tablePresent(ns, tableName)
	if err != nil || !present {
		return err
	}
	proxies, err := d.known(ns)
	if err != nil {
		return err
	}
	released := d.chains(PodRules{}, proxies, false)
	if err := checkTable(ns, tableName, released); errors.Is(err, ErrDrift) {
		err = replaceTable(ns, tableName, released)
		if err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	if needed, err := translated(ns); err != nil {
		// Without conntrack's list nobody knows: the chains do nothing by themselves.
		d.cfg.Logger.Warn("nftables chains without rules stay in a pod: connections that need them cannot be listed", "error", err.Error())
		return nil
	} else if needed {
		return nil
	}
	return removeTable(ns, tableName)
}

// translated reports whether a TCP connection of ns lives by the rules: its
// address was rewritten, or a mark leads its replies back to the proxy.
func translated(ns *netns.NS) (bool, error) {
	var nl *netlink.Handle
	ipv6 := false
	err := ns.Do(func() (err error) {
		ipv6 = ipv6Enabled()
		nl, err = netlink.NewHandle(unix.NETLINK_NETFILTER)
		return err
	})
	if err != nil {
		return false, fmt.Errorf("open conntrack netlink: %w", err)
	}
	defer nl.Close()
	families := []netlink.InetFamily{unix.AF_INET}
	if ipv6 {
		families = append(families, unix.AF_INET6)
	}
	for _, family := range families {
		flows, err := nl.ConntrackTableList(netlink.ConntrackTable, family)
		if err != nil {
			return false, fmt.Errorf("list conntrack entries: %w", err)
		}
		for _, f := range flows {
			if f.Forward.Protocol != unix.IPPROTO_TCP || over(f) {
				continue
			}
			if f.Mark&MarkMask == MarkReturn || !f.Forward.DstIP.Equal(f.Reverse.SrcIP) || f.Forward.DstPort != f.Reverse.SrcPort {
				return true, nil
			}
		}
	}
	return false, nil
}

// over reports a connection that both sides have ended; conntrack keeps it for two
// minutes more.
func over(f *netlink.ConntrackFlow) bool {
	const timeWait, closed = 7, 8 // enum tcp_conntrack in nf_conntrack_tcp.h
	tcp, ok := f.ProtoInfo.(*netlink.ProtoInfoTCP)
	return ok && (tcp.State == timeWait || tcp.State == closed)
}

// Yield implements Redirector. Captured connections need nothing of a pod's
// programs once they are established; its routes stay, among them the aliases'.
func (h *Hooks) Yield(ns *netns.NS) error {
	present, err := h.Present(ns)
	if err != nil || !present {
		return err
	}
	c, err := ns.Cookie()
	if err != nil {
		return err
	}
	if err := h.forget(c); err != nil {
		return err
	}
	return h.removeGates(ns)
}
