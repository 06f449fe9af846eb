package redirect

import (
	"errors"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// feature is a part of the rules that a kernel may lack, with the smallest table
// that needs it.
type feature struct {
	name  string
	chain []chain
}

var features = []feature{
	{"nftables (CONFIG_NF_TABLES_INET)", nil},
	{"nftables mark matching (CONFIG_NFT_CT)", []chain{{
		name: "c", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityMangle,
		rules: []rule{{"", []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: 1}}}},
	}}},
	{"conntrack zones (CONFIG_NF_CONNTRACK_ZONES; --dns-capture=false does without)", []chain{{
		name: "c", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityRaw,
		rules: []rule{{"", setZone(zoneProxy)}},
	}}},
	{"nftables route chains (CONFIG_NF_TABLES)", []chain{{
		name: "c", kind: nftables.ChainTypeRoute, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityMangle,
	}}},
	{"nftables nat chains (CONFIG_NFT_NAT)", []chain{{
		name: "c", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityNATDest,
	}}},
	{"nftables redirection (CONFIG_NFT_REDIR)", []chain{{
		name: "c", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityNATDest,
		rules: []rule{{"", join(l4proto(expr.CmpOpEq, unix.IPPROTO_TCP), redirectTo(PortOutbound))}},
	}}},
}

// explain finds out which feature a failed transaction lacked. Nothing is probed
// unless something failed.
func explain(ns *netns.NS, err error) error {
	if errors.Is(err, unix.EPERM) {
		return err // rights, not features
	}
	for _, f := range features {
		if ferr := try(ns, f.chain); ferr != nil {
			return &UnsupportedError{Feature: f.name, Err: err}
		}
	}
	return err
}

// try makes a table and takes it away within one transaction.
func try(ns *netns.NS, chains []chain) error {
	c, err := dialNft(ns)
	if err != nil {
		return err
	}
	defer c.CloseLasting()
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "ambit_feature"})
	queueChains(c, table, chains)
	c.DelTable(table)
	return c.Flush()
}
