package policy

import (
	"net/netip"
	"slices"
	"strings"
)

// facts are the parts of a connection that terms compare, taken apart once.
type facts struct {
	peer      bool
	principal string
	ns, sa    string
	src, dst  netip.Addr
	port      uint16
}

func (f *facts) set(c Conn) {
	*f = facts{
		peer: !c.Peer.IsZero(), principal: c.Peer.Principal(), ns: c.Peer.Namespace(), sa: c.Peer.ServiceAccount(),
		src: plain(c.Src.Addr()), dst: plain(c.Dst.Addr()), port: c.Dst.Port(),
	}
}

// plain: policies know neither mapped addresses nor zones.
func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// rule matches when all its clauses do.
type rule struct{ clauses []clause }

func (r *rule) matches(f *facts) bool {
	for i := range r.clauses {
		if !r.clauses[i].matches(f) {
			return false
		}
	}
	return true
}

// clause matches when one of its matches does. A match without terms is
// skipped, so a clause with nothing else never matches.
type clause struct{ alternatives []match }

func (c *clause) matches(f *facts) bool {
	for i := range c.alternatives {
		if c.alternatives[i].matches(f) {
			return true
		}
	}
	return false
}

// match matches when each term does. A nil term is absent, or could not be
// understood in a DENY.
type match struct {
	never bool // a term that must not match could not be understood in an ALLOW

	principals, notPrincipals *stringTerm
	namespaces, notNamespaces *stringTerm
	accounts, notAccounts     *accountTerm
	src, notSrc               *prefixTerm
	dst, notDst               *prefixTerm
	ports, notPorts           *portTerm
}

func (m *match) matches(f *facts) bool {
	switch {
	case m.never,
		m.ports != nil && !m.ports.has(f.port),
		m.notPorts != nil && m.notPorts.has(f.port),
		m.principals != nil && !(f.peer && m.principals.has(f.principal)),
		m.notPrincipals != nil && f.peer && m.notPrincipals.has(f.principal),
		m.namespaces != nil && !m.namespaces.has(f.ns),
		m.notNamespaces != nil && m.notNamespaces.has(f.ns),
		m.accounts != nil && !(f.peer && m.accounts.has(f.ns, f.sa)),
		m.notAccounts != nil && f.peer && m.notAccounts.has(f.ns, f.sa),
		m.src != nil && !m.src.has(f.src),
		m.notSrc != nil && m.notSrc.has(f.src),
		m.dst != nil && !m.dst.has(f.dst),
		m.notDst != nil && m.notDst.has(f.dst):
		return false
	}
	return true
}

// few is up to how many values a search one by one is the fastest.
const few = 8

// stringTerm: any of the values.
type stringTerm struct {
	exact          []string // sorted
	prefix, suffix []string
	presence       bool
}

func (t *stringTerm) has(s string) bool {
	if t.presence && s != "" {
		return true
	}
	if len(t.exact) > few {
		if _, ok := slices.BinarySearch(t.exact, s); ok {
			return true
		}
	} else if slices.Contains(t.exact, s) {
		return true
	}
	for _, p := range t.prefix {
		if strings.HasPrefix(s, p) {
			return true
		}
	}
	for _, p := range t.suffix {
		if strings.HasSuffix(s, p) {
			return true
		}
	}
	return false
}

type account struct{ ns, name string }

// accountTerm: any of the service accounts, whatever the trust domain.
type accountTerm struct{ list []account } // sorted

func (t *accountTerm) has(ns, sa string) bool {
	want := account{ns, sa}
	if len(t.list) <= few {
		return slices.Contains(t.list, want)
	}
	_, ok := slices.BinarySearchFunc(t.list, want, compareAccounts)
	return ok
}

func compareAccounts(a, b account) int {
	if c := strings.Compare(a.ns, b.ns); c != 0 {
		return c
	}
	return strings.Compare(a.name, b.name)
}

// prefixTerm: any of the ranges.
type prefixTerm struct {
	list []netip.Prefix
	set  map[netip.Prefix]struct{} // when there are many
	bits []int                     // lengths in set, per family told by sign: IPv6 is negative
}

func (t *prefixTerm) has(a netip.Addr) bool {
	if t.set == nil {
		for _, p := range t.list {
			if p.Contains(a) {
				return true
			}
		}
		return false
	}
	for _, b := range t.bits {
		if (b < 0) != a.Is6() {
			continue
		}
		if b < 0 {
			b = -b - 1
		}
		if p, err := a.Prefix(b); err == nil {
			if _, ok := t.set[p]; ok {
				return true
			}
		}
	}
	return false
}

func newPrefixTerm(list []netip.Prefix) *prefixTerm {
	t := &prefixTerm{list: list}
	if len(list) <= few {
		return t
	}
	t.set = make(map[netip.Prefix]struct{}, len(list))
	for _, p := range list {
		t.set[p] = struct{}{}
		b := p.Bits()
		if p.Addr().Is6() {
			b = -b - 1
		}
		if !slices.Contains(t.bits, b) {
			t.bits = append(t.bits, b)
		}
	}
	return t
}

// portTerm: any of the ports.
type portTerm struct{ list []uint16 } // sorted

func (t *portTerm) has(p uint16) bool {
	if len(t.list) <= few {
		return slices.Contains(t.list, p)
	}
	_, ok := slices.BinarySearch(t.list, p)
	return ok
}
