package derive

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
	"time"
)

// Virtual addresses for hosts of ServiceEntries that declare none, so that node
// proxies can tell their connections apart. The ranges are Istio's; neither is
// routed anywhere (240.0.0.0/4 is reserved by RFC 1112, 2001:2::/48 is for
// benchmarking by RFC 5180).
//
// The engine remembers nothing from one process to the next, so an address is a
// function of the objects alone: each host has its own sequence of addresses, by
// hash, and gets the first that neither an object declares by itself nor an older
// host holds (age as the API server recorded it; in plain files, which have none, the
// name decides). Hence the order of files, restarts and replicas do not matter,
// and an entry that is added never moves an older one. What does move a host: an
// object that declares its very address (a range that holds it does not: proxies
// look for ranges last), and, where two hosts collided (with 300
// hosts an even chance that some two did), the end of the older one, whose
// address the younger one then takes.

var (
	vipRange4 = netip.MustParsePrefix("240.240.0.0/16")
	vipRange6 = netip.MustParsePrefix("2001:2::/48")
)

const (
	// A prime just below the size of the IPv4 range: a step of any length visits
	// every address. It leaves out the first address and the last few.
	vipSlots4 = 65521
	// Bound of the search. With 60,000 hosts it still finds a free one for all but
	// a few in a billion; it bounds what one host can cost when all is taken.
	vipTries = 256
)

// vipClaim is one host that is to have virtual addresses.
type vipClaim struct {
	host    nn // namespace and host name
	created time.Time
	start   uint64
	step    uint64
	at      [2]vipSeat // IPv4, IPv6
}

// vipSeat is how far a host got in its sequence.
type vipSeat struct {
	tries int        // addresses it was turned away from
	addr  netip.Addr // invalid: none was free
}

// before says which of two hosts keeps an address both come to.
func (c *vipClaim) before(o *vipClaim) bool {
	if d := c.created.Compare(o.created); d != 0 {
		return d < 0
	}
	return c.host.compare(o.host) < 0
}

// candidate is an element of the host's sequence for a family (0: IPv4).
func (c *vipClaim) candidate(family, try int) netip.Addr {
	if family == 0 {
		step := 1 + c.step%(vipSlots4-1)
		slot := uint32((c.start%vipSlots4 + uint64(try)*step) % vipSlots4)
		b := vipRange4.Addr().As4()
		binary.BigEndian.PutUint16(b[2:], uint16(slot+1))
		return netip.AddrFrom4(b)
	}
	b := vipRange6.Addr().As16()
	binary.BigEndian.PutUint64(b[8:], c.start+uint64(try)*(c.step|1)) // odd: no repetition
	return netip.AddrFrom16(b)
}

// vips allocates. The outcome does not depend on the order of calls: hosts choose
// in order of age, and every call restores exactly what that order gives.
type vips struct {
	claims  map[nn]*vipClaim
	holders map[netip.Addr]*vipClaim
	// wanted remembers who was turned away where, to be asked when it gets free.
	wanted map[netip.Addr]map[*vipClaim]struct{}

	declared map[source][]netip.Addr // within the ranges, so nearly always empty
	blocked  map[netip.Addr]int      // how many declare it

	changed set[nn] // hosts whose addresses may differ since the last drain
}

func newVIPs() *vips {
	return &vips{
		claims: map[nn]*vipClaim{}, holders: map[netip.Addr]*vipClaim{}, wanted: map[netip.Addr]map[*vipClaim]struct{}{},
		declared: map[source][]netip.Addr{}, blocked: map[netip.Addr]int{}, changed: set[nn]{},
	}
}

// addrs lists the addresses of a host, IPv4 first.
func (v *vips) addrs(host nn) []netip.Addr {
	c := v.claims[host]
	if c == nil {
		return nil
	}
	var out []netip.Addr
	for _, seat := range c.at {
		if seat.addr.IsValid() {
			out = append(out, seat.addr)
		}
	}
	return out
}

// claim gives a host its addresses.
func (v *vips) claim(host nn, created time.Time) {
	if c := v.claims[host]; c != nil {
		if c.created.Equal(created) {
			return
		}
		v.release(host)
	}
	sum := sha256.Sum256([]byte(host.String()))
	c := &vipClaim{host: host, created: created, start: binary.BigEndian.Uint64(sum[:]), step: binary.BigEndian.Uint64(sum[8:])}
	v.claims[host] = c
	for family := range c.at {
		v.seat(family, c)
	}
}

// release takes a host's addresses back.
func (v *vips) release(host nn) {
	c := v.claims[host]
	if c == nil {
		return
	}
	delete(v.claims, host)
	v.changed[host] = struct{}{}
	for family := range c.at {
		v.forget(family, c, 0)
		if a := c.at[family].addr; a.IsValid() {
			v.free(family, a)
		}
	}
}

// seat finds a place for c, and for everybody younger that has to yield.
func (v *vips) seat(family int, c *vipClaim) {
	for c != nil {
		v.changed[c.host] = struct{}{}
		next := (*vipClaim)(nil)
		for seat := &c.at[family]; seat.tries < vipTries; seat.tries++ {
			a := c.candidate(family, seat.tries)
			holder := v.holders[a]
			if v.blocked[a] == 0 && (holder == nil || c.before(holder)) {
				v.holders[a], seat.addr = c, a
				if holder != nil {
					v.turnAway(family, holder, a)
					next = holder
				}
				break
			}
			v.want(a, c)
		}
		c = next
	}
}

// turnAway takes the address a from c, which goes on searching behind it.
func (v *vips) turnAway(family int, c *vipClaim, a netip.Addr) {
	c.at[family].addr = netip.Addr{}
	c.at[family].tries++
	v.want(a, c)
}

func (v *vips) want(a netip.Addr, c *vipClaim) {
	if v.wanted[a] == nil {
		v.wanted[a] = map[*vipClaim]struct{}{}
	}
	v.wanted[a][c] = struct{}{}
}

// forget drops what c wanted from its try'th address on.
func (v *vips) forget(family int, c *vipClaim, try int) {
	for ; try < c.at[family].tries; try++ {
		a := c.candidate(family, try)
		if delete(v.wanted[a], c); len(v.wanted[a]) == 0 {
			delete(v.wanted, a)
		}
	}
}

// free offers an address that nobody holds any more to the oldest host that was
// turned away from it, and that one's address to others in turn.
func (v *vips) free(family int, a netip.Addr) {
	for a.IsValid() {
		delete(v.holders, a)
		if v.blocked[a] > 0 {
			return
		}
		var best *vipClaim
		for c := range v.wanted[a] {
			if best == nil || c.before(best) {
				best = c
			}
		}
		if best == nil {
			return
		}
		try := 0
		for best.candidate(family, try) != a {
			try++
		}
		left := best.at[family].addr
		v.forget(family, best, try)
		best.at[family] = vipSeat{tries: try, addr: a}
		v.holders[a] = best
		v.changed[best.host] = struct{}{}
		a = left
	}
}

// declare says which addresses an object uses: they are not given to others.
func (v *vips) declare(src source, addrs []netip.Prefix) {
	var now []netip.Addr
	for _, p := range addrs {
		if a := p.Addr(); p.IsSingleIP() && (vipRange4.Contains(a) || vipRange6.Contains(a)) {
			now = append(now, a)
		}
	}
	was := v.declared[src]
	if len(was) == 0 && len(now) == 0 {
		return
	}
	if len(now) == 0 {
		delete(v.declared, src)
	} else {
		v.declared[src] = now
	}
	for _, a := range now {
		if v.blocked[a]++; v.blocked[a] == 1 {
			v.evict(a)
		}
	}
	for _, a := range was {
		if v.blocked[a]--; v.blocked[a] > 0 {
			continue
		}
		delete(v.blocked, a)
		if v.holders[a] == nil {
			v.free(family(a), a) // to whom it was refused
		}
	}
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// evict moves the host that has what an object declares.
func (v *vips) evict(a netip.Addr) {
	if c := v.holders[a]; c != nil {
		delete(v.holders, a)
		v.turnAway(family(a), c, a)
		v.seat(family(a), c)
	}
}

// drain returns the hosts whose addresses may have changed since the last call.
func (v *vips) drain() set[nn] {
	out := v.changed
	v.changed = set[nn]{}
	return out
}

// singles are addresses as prefixes.
func singles(addrs []netip.Addr) []netip.Prefix {
	if len(addrs) == 0 {
		return nil
	}
	out := make([]netip.Prefix, len(addrs))
	for i, a := range addrs {
		out[i] = netip.PrefixFrom(a, a.BitLen())
	}
	return out
}

// compareAge orders objects of one kind: the oldest is in force. Without times,
// as in plain files, the name decides.
func compareAge(aCreated time.Time, a nn, bCreated time.Time, b nn) int {
	return cmp.Or(aCreated.Compare(bCreated), a.compare(b))
}
