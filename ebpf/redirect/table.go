package redirect

import (
	"errors"
	"fmt"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// dialNft opens a netlink socket in ns; the caller ends it with CloseLasting.
func dialNft(ns *netns.NS) (*nftables.Conn, error) {
	var c *nftables.Conn
	err := ns.Do(func() (err error) {
		c, err = nftables.New(nftables.AsLasting())
		return err
	})
	if err != nil {
		if c != nil {
			_ = c.CloseLasting() // err says more
		}
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return c, nil
}

func findTable(c *nftables.Conn, name string) (bool, error) {
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("list nftables tables: %w", err)
	}
	return slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == name }), nil
}

func tablePresent(ns *netns.NS, name string) (bool, error) {
	c, err := dialNft(ns)
	if err != nil {
		return false, err
	}
	defer c.CloseLasting()
	return findTable(c, name)
}

// replaceTable puts chains in the place of whatever the table held, in one transaction.
func replaceTable(ns *netns.NS, name string, chains []chain) error {
	c, err := dialNft(ns)
	if err != nil {
		return err
	}
	defer c.CloseLasting()
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: name}
	// Adding first makes deleting valid whether or not there was one.
	c.AddTable(table)
	c.DelTable(table)
	c.AddTable(table)
	queueChains(c, table, chains)
	if err := c.Flush(); err != nil {
		return explain(ns, fmt.Errorf("write nftables table inet %s: %w", name, err))
	}
	return nil
}

func queueChains(c *nftables.Conn, table *nftables.Table, chains []chain) {
	for _, ch := range chains {
		nc := c.AddChain(&nftables.Chain{
			Name: ch.name, Table: table, Type: ch.kind, Hooknum: ch.hook, Priority: ch.priority,
		})
		for _, r := range ch.rules {
			c.AddRule(&nftables.Rule{
				Table: table, Chain: nc, Exprs: r.exprs,
				UserData: userdata.AppendString(nil, userdata.TypeComment, r.comment),
			})
		}
	}
}

func removeTable(ns *netns.NS, name string) error {
	c, err := dialNft(ns)
	if err != nil {
		return err
	}
	defer c.CloseLasting()
	present, err := findTable(c, name)
	if err != nil || !present {
		return err
	}
	c.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: name})
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete nftables table inet %s: %w", name, err)
	}
	return nil
}

// checkTable compares the kernel's chains and rules with the wanted ones,
// expression by expression.
func checkTable(ns *netns.NS, name string, want []chain) error {
	c, err := dialNft(ns)
	if err != nil {
		return err
	}
	defer c.CloseLasting()
	present, err := findTable(c, name)
	if err != nil {
		return err
	}
	if !present {
		return fmt.Errorf("%w: no nftables table inet %s", ErrDrift, name)
	}
	all, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("list nftables chains: %w", err)
	}
	have := map[string]*nftables.Chain{}
	for _, ch := range all {
		if ch.Table.Name == name {
			have[ch.Name] = ch
		}
	}
	if len(have) != len(want) {
		return fmt.Errorf("%w: table inet %s has %d chains, want %d", ErrDrift, name, len(have), len(want))
	}
	for _, w := range want {
		h := have[w.name]
		if h == nil || h.Hooknum == nil || h.Priority == nil ||
			h.Type != w.kind || *h.Hooknum != *w.hook || *h.Priority != *w.priority {
			return fmt.Errorf("%w: chain %s of table inet %s is missing or hooked elsewhere", ErrDrift, w.name, name)
		}
		rules, err := c.GetRules(h.Table, h)
		if err != nil {
			return fmt.Errorf("list rules of chain %s: %w", w.name, err)
		}
		if len(rules) != len(w.rules) {
			return fmt.Errorf("%w: chain %s of table inet %s has %d rules, want %d", ErrDrift, w.name, name, len(rules), len(w.rules))
		}
		for i, r := range rules {
			if !sameExprs(r.Exprs, w.rules[i].exprs) {
				return fmt.Errorf("%w: rule %d of chain %s of table inet %s (%s)", ErrDrift, i+1, w.name, name, w.rules[i].comment)
			}
		}
	}
	return nil
}

func sameExprs(read, want []expr.Any) bool {
	// The library leaves out what it cannot decode; a cgroup's number is compared all the same.
	want = slices.DeleteFunc(slices.Clone(want), func(e expr.Any) bool { _, ok := e.(*expr.Socket); return ok })
	if len(read) != len(want) {
		return false
	}
	for i := range read {
		if !sameExpr(read[i], want[i]) {
			return false
		}
	}
	return true
}

// sameExpr compares what was read with what is written.
func sameExpr(read, want expr.Any) bool {
	if w, ok := want.(*expr.Ct); ok && w.SourceRegister {
		// The library does not decode the register a ct statement reads from.
		want = &expr.Ct{Key: w.Key}
	}
	return reflect.DeepEqual(read, want)
}
