package redirect

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// family is one address family's way back: packets with MarkReturn are local,
// whatever their destination.
type family struct {
	number int
	name   string
	all    *net.IPNet
}

var (
	inet4 = family{unix.AF_INET, "IPv4", &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}}
	inet6 = family{unix.AF_INET6, "IPv6", &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}}
)

func (f family) rule() *netlink.Rule {
	mask := uint32(MarkMask)
	r := netlink.NewRule()
	r.Family, r.Priority, r.Mark, r.Mask, r.Table = f.number, rulePriority, MarkReturn, &mask, routeTable
	return r
}

func (f family) route(loopback int) *netlink.Route {
	return &netlink.Route{
		Family: f.number, LinkIndex: loopback, Dst: f.all, Table: routeTable,
		Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
	}
}

// withLinks opens route netlink in ns, finds the families in use there and calls f.
func withLinks(ns *netns.NS, needV6 bool, f func(h *netlink.Handle, lo int, families []family) error) error {
	var h *netlink.Handle
	ipv6 := false
	err := ns.Do(func() (err error) {
		ipv6 = ipv6Enabled()
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if h != nil {
		defer h.Close()
	}
	if err != nil {
		return fmt.Errorf("open route netlink: %w", err)
	}
	families := []family{inet4}
	if ipv6 {
		families = append(families, inet6)
	} else if needV6 {
		return &UnsupportedError{Feature: "IPv6 in the pod's network namespace (net.ipv6.conf.lo.disable_ipv6=1, or no CONFIG_IPV6)", Err: unix.EAFNOSUPPORT}
	}
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	return f(h, lo.Attrs().Index, families)
}

// ipv6Enabled reads the sysctl of the calling thread's namespace.
func ipv6Enabled() bool {
	v, err := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
	return err == nil && strings.TrimSpace(string(v)) == "0"
}

func applyRoutes(ns *netns.NS, needV6 bool) error {
	return withLinks(ns, needV6, func(h *netlink.Handle, lo int, families []family) error {
		for _, f := range families {
			if err := h.RouteReplace(f.route(lo)); err != nil {
				return fmt.Errorf("add %s local route to table %d: %w", f.name, routeTable, unsupported(f, err))
			}
			if have, err := hasRule(h, f); err != nil {
				return err
			} else if have {
				continue
			}
			if err := h.RuleAdd(f.rule()); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("add %s rule for mark %#x: %w", f.name, MarkReturn, unsupported(f, err))
			}
		}
		return nil
	})
}

func unsupported(f family, err error) error {
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return &UnsupportedError{Feature: f.name + " policy routing (CONFIG_IP_MULTIPLE_TABLES, CONFIG_IPV6_MULTIPLE_TABLES)", Err: err}
	}
	return err
}

func hasRule(h *netlink.Handle, f family) (bool, error) {
	rules, err := h.RuleList(f.number)
	if err != nil {
		return false, fmt.Errorf("list %s rules: %w", f.name, unsupported(f, err))
	}
	for _, r := range rules {
		if r.Priority == rulePriority && r.Mark == MarkReturn && r.Table == routeTable && r.Mask != nil && *r.Mask == MarkMask {
			return true, nil
		}
	}
	return false, nil
}

func hasRoute(h *netlink.Handle, f family, lo int) (bool, error) {
	routes, err := h.RouteListFiltered(f.number, &netlink.Route{Table: routeTable}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return false, fmt.Errorf("list %s routes of table %d: %w", f.name, routeTable, err)
	}
	for _, r := range routes {
		ones := 0
		if r.Dst != nil {
			ones, _ = r.Dst.Mask.Size()
		}
		if r.Type == unix.RTN_LOCAL && r.LinkIndex == lo && ones == 0 {
			return true, nil
		}
	}
	return false, nil
}

func checkRoutes(ns *netns.NS, needV6 bool) error {
	return withLinks(ns, needV6, func(h *netlink.Handle, lo int, families []family) error {
		for _, f := range families {
			if have, err := hasRule(h, f); err != nil {
				return err
			} else if !have {
				return fmt.Errorf("%w: no %s rule for mark %#x", ErrDrift, f.name, MarkReturn)
			}
			if have, err := hasRoute(h, f, lo); err != nil {
				return err
			} else if !have {
				return fmt.Errorf("%w: no %s local route in table %d", ErrDrift, f.name, routeTable)
			}
		}
		return nil
	})
}

func removeRoutes(ns *netns.NS) error {
	return withLinks(ns, false, func(h *netlink.Handle, lo int, families []family) error {
		for _, f := range families {
			for {
				have, err := hasRule(h, f)
				if err != nil {
					return err
				}
				if !have {
					break
				}
				if err := h.RuleDel(f.rule()); err != nil {
					return fmt.Errorf("delete %s rule for mark %#x: %w", f.name, MarkReturn, err)
				}
			}
			if err := h.RouteDel(f.route(lo)); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("delete %s local route of table %d: %w", f.name, routeTable, err)
			}
		}
		return nil
	})
}
