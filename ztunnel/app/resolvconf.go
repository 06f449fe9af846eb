package app

import (
	"net"
	"net/netip"
	"os"
	"strings"
)

// resolvConf is what this host's resolver is set to: where a dedicated proxy
// forwards questions that came to it without redirection, and what names the
// host's programs complete.
type resolvConf struct {
	servers []netip.Addr
	search  []string
}

// readResolvConf takes what it understands of a file, resolv.conf(5); one that
// is not there is empty.
func readResolvConf(path string) (c resolvConf) {
	b, err := os.ReadFile(path)
	if err != nil {
		return c
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			// One of our own would ask itself.
			if a, err := netip.ParseAddr(f[1]); err == nil && (!a.IsLoopback() || a == localStub) {
				c.servers = append(c.servers, a.Unmap())
			}
		case "search", "domain":
			c.search = f[1:] // the last one counts
		}
	}
	return c
}

// localStub is systemd-resolved's, on a loopback address that is not ours.
var localStub = netip.AddrFrom4([4]byte{127, 0, 0, 53})

const portDNS = 53

// datagram is what a datagram was addressed to before redirection, or else the
// host's name server.
func (c resolvConf) datagram(redirected func(client, local netip.AddrPort) (netip.AddrPort, error)) func(client, local netip.AddrPort) (netip.AddrPort, error) {
	return func(client, local netip.AddrPort) (netip.AddrPort, error) {
		dst, err := redirected(client, local)
		if (err != nil || dst == local) && len(c.servers) > 0 {
			return netip.AddrPortFrom(c.servers[0], portDNS), nil
		}
		return dst, err
	}
}

// stream is the same of a connection.
func (c resolvConf) stream(redirected func(net.Conn) (netip.AddrPort, error)) func(net.Conn) (netip.AddrPort, error) {
	return func(conn net.Conn) (netip.AddrPort, error) {
		dst, err := redirected(conn)
		if (err != nil || dst == addrPortOf(conn.LocalAddr())) && len(c.servers) > 0 {
			return netip.AddrPortFrom(c.servers[0], portDNS), nil
		}
		return dst, err
	}
}
