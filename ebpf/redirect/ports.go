package redirect

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// MaxPortRanges bounds what one pod leaves out in one direction: programs and
// rules look at each range for each connection.
const MaxPortRanges = 16

// Ports is a set of TCP ports as text: ranges in order, with no two that touch
// ("80,8000-8099"). The zero Ports is empty; make others with ParsePorts.
type Ports string

// PortRange is First to Last, both included.
type PortRange struct{ First, Last uint16 }

// ParsePorts reads a comma-separated list of ports and ranges. The proxy's own
// ports are nobody's to leave out.
func ParsePorts(list string) (Ports, error) {
	var ranges []PortRange
	for item := range strings.SplitSeq(list, ",") {
		if item = strings.TrimSpace(item); item == "" {
			continue
		}
		r, err := parseRange(item)
		if err != nil {
			return "", err
		}
		ranges = append(ranges, r)
	}
	slices.SortFunc(ranges, func(a, b PortRange) int { return int(a.First) - int(b.First) })
	var merged []PortRange
	for _, r := range ranges {
		if n := len(merged); n > 0 && int(r.First) <= int(merged[n-1].Last)+1 {
			merged[n-1].Last = max(merged[n-1].Last, r.Last)
			continue
		}
		merged = append(merged, r)
	}
	if len(merged) > MaxPortRanges {
		return "", fmt.Errorf("%d ports and ranges are more than %d: join neighbours to ranges", len(merged), MaxPortRanges)
	}
	var text []string
	for _, r := range merged {
		text = append(text, r.String())
	}
	return Ports(strings.Join(text, ",")), nil
}

func parseRange(item string) (PortRange, error) {
	first, last, isRange := strings.Cut(item, "-")
	if !isRange {
		last = first
	}
	var r PortRange
	var errs [2]error
	r.First, errs[0] = parsePort(first)
	r.Last, errs[1] = parsePort(last)
	if err := errors.Join(errs[:]...); err != nil {
		return r, fmt.Errorf("%q is no port and no range of ports (1-65535)", item)
	}
	if r.First > r.Last {
		return r, fmt.Errorf("range %q ends before it begins", item)
	}
	for _, own := range []uint16{PortOutbound, PortInbound, PortHBONE, PortDNS} {
		if r.contains(own) {
			return r, fmt.Errorf("%q contains the proxy's port %d: leave it out", item, own)
		}
	}
	return r, nil
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(strings.TrimSpace(s), 10, 16)
	if err == nil && n == 0 {
		err = strconv.ErrRange
	}
	return uint16(n), err
}

func (r PortRange) contains(port uint16) bool { return r.First <= port && port <= r.Last }

func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// Ranges returns the set's ranges in order.
func (p Ports) Ranges() []PortRange {
	if p == "" {
		return nil
	}
	var out []PortRange
	for item := range strings.SplitSeq(string(p), ",") {
		r, err := parseRange(item)
		if err != nil {
			panic(fmt.Sprintf("BUG: ports %q were not made by ParsePorts: %v", string(p), err))
		}
		out = append(out, r)
	}
	return out
}

// Has reports whether the set contains port.
func (p Ports) Has(port uint16) bool {
	return slices.ContainsFunc(p.Ranges(), func(r PortRange) bool { return r.contains(port) })
}
