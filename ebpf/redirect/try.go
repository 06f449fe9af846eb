package redirect

import (
	"errors"
	"fmt"
	"net"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// Try captures a network namespace that it makes for the purpose, as Apply would
// a pod's, and takes it away again: what this kernel lacks shows before a pod
// depends on it.
func (h *Hooks) Try() error {
	ns, err := scratch()
	if err != nil {
		return fmt.Errorf("make a network namespace to try in: %w", err)
	}
	defer ns.Close()
	err = h.Apply(ns, PodRules{DNS: true})
	return errors.Join(err, h.Remove(ns))
}

// scratch is a namespace with a cable whose other end is there too.
func scratch() (*netns.NS, error) {
	type result struct {
		ns  *netns.NS
		err error
	}
	resultc := make(chan result, 1)
	go func() {
		// A thread that cannot come back ends with its goroutine, which has not unlocked it.
		runtime.LockOSThread()
		var r result
		home, err := netns.Current()
		if err != nil {
			resultc <- result{nil, err}
			return
		}
		defer home.Close()
		back := error(nil)
		if r.err = unix.Unshare(unix.CLONE_NEWNET); r.err == nil {
			r.ns, r.err = netns.Current()
			// The process's main thread does not end: it and /proc/self would stay in there for good.
			_ = home.Control(func(fd int) { back = unix.Setns(fd, unix.CLONE_NEWNET) }) // open as it is, f is called
		}
		if back == nil {
			runtime.UnlockOSThread()
		}
		resultc <- r
	}()
	r := <-resultc
	if r.err != nil {
		return nil, r.err
	}
	err := r.ns.Do(func() error {
		nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer nl.Close()
		cable := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: "try1"}
		cable.Name = "try0"
		if err := nl.LinkAdd(cable); err != nil {
			return fmt.Errorf("add a cable: %w", err)
		}
		// 192.0.2.0/24 is for documentation: RFC 5737.
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(192, 0, 2, 1), Mask: net.CIDRMask(32, 32)}}
		lo, err := nl.LinkByName("lo")
		if err != nil {
			return err
		}
		return errors.Join(nl.LinkSetUp(lo), nl.LinkSetUp(cable), nl.AddrAdd(cable, addr))
	})
	if err != nil {
		_ = r.ns.Close() // err says more
		return nil, err
	}
	return r.ns, nil
}
