package fabric

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/ambit-mesh/ambit/test/lab/process"
)

// VIP is one port of one service address and where it leads.
type VIP struct {
	Addr     netip.Addr
	Proto    string // tcp, udp
	Port     uint16
	Backends []netip.AddrPort
}

// Ruleset is what plays kube-proxy on every node: service addresses of pods (and
// of the node's own programs) are translated when their packets reach the node.
func Ruleset(vips []VIP) string {
	var nat, refuse strings.Builder
	loops := map[string]bool{}
	var hair4, hair6 []string
	for _, v := range vips {
		fam := family(v.Addr)
		match := fmt.Sprintf("%s daddr %s %s dport %d", fam, v.Addr, v.Proto, v.Port)
		if len(v.Backends) == 0 {
			how := "reject with tcp reset"
			if v.Proto != "tcp" {
				how = "reject"
			}
			fmt.Fprintf(&refuse, "    %s %s\n", match, how)
			continue
		}
		var choices []string
		for i, b := range v.Backends {
			choices = append(choices, fmt.Sprintf("%d : %s . %d", i, b.Addr(), b.Port()))
			if pair := fmt.Sprintf("%s . %s", b.Addr(), b.Addr()); !loops[pair] {
				loops[pair] = true
				if fam == "ip" {
					hair4 = append(hair4, pair)
				} else {
					hair6 = append(hair6, pair)
				}
			}
		}
		fmt.Fprintf(&nat, "    %s dnat %s addr . port to numgen random mod %d map { %s }\n", match, fam, len(v.Backends), strings.Join(choices, ", "))
	}
	var b strings.Builder
	b.WriteString("add table inet lab\ndelete table inet lab\ntable inet lab {\n")
	b.WriteString(set("hairpin4", "ipv4_addr", hair4) + set("hairpin6", "ipv6_addr", hair6))
	fmt.Fprintf(&b, "  chain services {\n%s  }\n  chain refused {\n%s  }\n", nat.String(), refuse.String())
	b.WriteString(`  chain prerouting { type nat hook prerouting priority dstnat; policy accept; jump services; }
  chain output { type nat hook output priority -100; policy accept; jump services; }
  chain forward { type filter hook forward priority filter; policy accept; jump refused; }
  chain local { type filter hook output priority filter; policy accept; jump refused; }
  chain postrouting { type nat hook postrouting priority srcnat; policy accept;
    ip saddr . ip daddr @hairpin4 masquerade
    ip6 saddr . ip6 daddr @hairpin6 masquerade
  }
}
`)
	return b.String()
}

func set(name, kind string, pairs []string) string {
	elements := ""
	if len(pairs) > 0 {
		elements = " elements = { " + strings.Join(pairs, ", ") + " };"
	}
	return fmt.Sprintf("  set %s { type %s . %s;%s }\n", name, kind, kind, elements)
}

func family(a netip.Addr) string {
	if a.Is6() {
		return "ip6"
	}
	return "ip"
}

// SetVIPs replaces the machine's service translation in one transaction.
func (m *Machine) SetVIPs(ctx context.Context, vips []VIP) error {
	return m.nft(ctx, Ruleset(vips))
}

func (m *Machine) nft(ctx context.Context, rules string) error {
	in, out, err := os.Pipe()
	if err != nil {
		return err
	}
	defer in.Close()
	errR, errW, err := os.Pipe()
	if err != nil {
		_ = out.Close()
		return err
	}
	defer errR.Close()
	p, err := process.Start(process.Spec{Argv: []string{"nft", "-f", "-"}, Env: os.Environ(), NetNS: m.Path()}, in, nil, errW)
	_ = errW.Close() // the child has its own
	if err != nil {
		_ = out.Close()
		return err
	}
	go func() {
		_, _ = out.WriteString(rules) // nft says what it misses
		_ = out.Close()
	}()
	var said bytes.Buffer
	_, _ = said.ReadFrom(errR) // ends with the process
	select {
	case <-p.Done():
	case <-ctx.Done():
		p.Stop(0)
		return context.Cause(ctx)
	}
	if code, _ := p.Exit(); code != 0 {
		return fmt.Errorf("nft on %s: exit status %d: %s", m.Name, code, bytes.TrimSpace(said.Bytes()))
	}
	return nil
}
