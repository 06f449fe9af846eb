package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

const hostTable = "ambit_node"

// Host writes the node's own rule: TCP connections that the node's processes
// open to enrolled pods (kubelet's probes) get the probe address as their source,
// which the pods' rules let through. Without it STRICT would fail every probe.
//
// Methods must not run at the same time.
type Host struct {
	cfg Config
	ns  *netns.NS
}

// NewHost returns the rules of the node's namespace ns, which stays the caller's.
func NewHost(cfg Config, ns *netns.NS) (*Host, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("configure node rules: %w", err)
	}
	return &Host{cfg: cfg, ns: ns}, nil
}

// Set makes pods the addresses treated so, in one transaction.
func (h *Host) Set(pods []netip.Addr) error {
	c, err := dialNft(h.ns)
	if err != nil {
		return err
	}
	defer c.CloseLasting()
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: hostTable}
	c.AddTable(table)
	c.DelTable(table)
	c.AddTable(table)
	post := c.AddChain(&nftables.Chain{
		Name: "nat_postrouting", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	var v4, v6 []nftables.SetElement
	for _, a := range compactAddrs(pods) {
		if a.Is4() {
			v4 = append(v4, nftables.SetElement{Key: a.AsSlice()})
		} else {
			v6 = append(v6, nftables.SetElement{Key: a.AsSlice()})
		}
	}
	err = errors.Join(
		h.add(c, table, post, &nftables.Set{Name: "pods4", ID: 1, KeyType: nftables.TypeIPAddr}, v4, h.cfg.ProbeV4),
		h.add(c, table, post, &nftables.Set{Name: "pods6", ID: 2, KeyType: nftables.TypeIP6Addr}, v6, h.cfg.ProbeV6),
	)
	if err != nil {
		return fmt.Errorf("prepare nftables table inet %s: %w", hostTable, err)
	}
	if err := c.Flush(); err != nil {
		return explain(h.ns, fmt.Errorf("write nftables table inet %s: %w", hostTable, err))
	}
	return nil
}

func compactAddrs(pods []netip.Addr) []netip.Addr {
	addrs := make([]netip.Addr, len(pods))
	for i, a := range pods {
		addrs[i] = a.Unmap().WithZone("")
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

func (h *Host) add(c *nftables.Conn, table *nftables.Table, post *nftables.Chain, set *nftables.Set, elements []nftables.SetElement, probe netip.Addr) error {
	set.Table = table
	if err := c.AddSet(set, elements); err != nil {
		return err
	}
	family, length, offset := uint32(unix.NFPROTO_IPV4), uint32(4), uint32(16)
	if probe.Is6() {
		family, length, offset = unix.NFPROTO_IPV6, 16, 24
	}
	c.AddRule(&nftables.Rule{
		Table: table, Chain: post,
		UserData: userdata.AppendString(nil, userdata.TypeComment, "the node's own connections to enrolled pods"),
		Exprs: join(
			[]expr.Any{
				&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{byte(family)}},
			},
			l4proto(expr.CmpOpEq, unix.IPPROTO_TCP),
			[]expr.Any{
				// Loading the owner's uid fails, and so ends the rule, unless a
				// socket of this very namespace sent the packet (nft_meta.c):
				// what is forwarded for others never matches. The comparison only
				// makes `nft list` print the condition.
				&expr.Meta{Key: expr.MetaKeySKUID, Register: 1},
				&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 4, Size: 4},
				&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: make([]byte, 4)},
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
				&expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID},
				&expr.Immediate{Register: 1, Data: probe.AsSlice()},
				&expr.NAT{Type: expr.NATTypeSourceNAT, Family: family, RegAddrMin: 1},
			}),
	})
	return nil
}

// Remove takes the node's rule away. Doing it twice is no error.
func (h *Host) Remove() error { return removeTable(h.ns, hostTable) }
