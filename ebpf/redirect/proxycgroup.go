package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/cgroup"
	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// A mark proves nothing: CAP_NET_RAW, a container default, is enough to set one.
// Where the kernel compares the cgroup of a packet's socket (Linux 5.13), rules
// know the proxy by it, and by the mark only until a proxy was there:
//
//	output  the socket's cgroup is the proxy's ─▶ not captured; over lo: connection mark
//	input   connection mark ─▶ not captured
//
// An app can set no connection mark without CAP_NET_ADMIN.

// cgroupMatch is a cgroup by number, at its depth below the root. A number is
// never used twice, so a match at a wrong depth matches nothing.
type cgroupMatch struct {
	id    uint64
	level uint32
}

// maxMatches bounds the proxies that rules know: those in an upgrade, and some
// that are gone, which do no harm.
const maxMatches = 8

// proxySet is what a Dataplane was told about proxies.
type proxySet struct {
	mu      sync.Mutex
	matches []cgroupMatch // newest last
}

// Proxy makes the processes of a cgroup2 directory the node proxy, and reports
// whether rules of pods have to be applied again before it serves them. Where the
// kernel cannot tell sockets by cgroup nothing changes; see Limits.
func (d *Dataplane) Proxy(dir string) (changed bool, err error) {
	id, err := cgroupID(dir)
	if err != nil {
		return false, fmt.Errorf("find the proxy's cgroup %s: %w", dir, err)
	}
	levels, err := levelsOf(dir)
	if err != nil {
		return false, fmt.Errorf("find the depth of the proxy's cgroup %s: %w", dir, err)
	}
	home, err := netns.Current()
	if err != nil {
		return false, err
	}
	defer home.Close()
	var matches []cgroupMatch
	for _, l := range levels {
		matches = append(matches, cgroupMatch{id, l})
	}
	d.proxies.mu.Lock()
	defer d.proxies.mu.Unlock()
	if err := try(home, socketCgroupFeature(matches[0])); err != nil {
		d.cfg.Logger.Warn("rules know the proxy by its mark, which pods can set too", "lacking", "nftables socket cgroupv2 (CONFIG_NFT_SOCKET, Linux 5.13)", "error", err.Error())
		return false, nil
	}
	if slices.Contains(d.proxies.matches, matches[0]) {
		return false, nil
	}
	d.proxies.matches = newest(d.proxies.matches, matches)
	return true, nil
}

// newest joins two lists, the newer one last, and forgets the oldest of too many.
func newest(older, newer []cgroupMatch) []cgroupMatch {
	out := slices.DeleteFunc(slices.Clone(older), func(m cgroupMatch) bool { return slices.Contains(newer, m) })
	out = append(out, newer...)
	return out[max(0, len(out)-maxMatches):]
}

func socketCgroupFeature(m cgroupMatch) []chain {
	return []chain{{
		name: "c", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityMangle,
		rules: []rule{{"", m.exprs()}},
	}}
}

// byMark reports whether rules know the proxy by its mark alone.
func (d *Dataplane) byMark() bool {
	d.proxies.mu.Lock()
	defer d.proxies.mu.Unlock()
	return len(d.proxies.matches) == 0
}

func (m cgroupMatch) exprs() []expr.Any {
	return []expr.Any{
		&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: m.level, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.NativeEndian.AppendUint64(nil, m.id)},
	}
}

// known returns the proxies that ns's rules are about: those that they were about
// already, for an agent that has started anew and met no proxy yet, and ours.
func (d *Dataplane) known(ns *netns.NS) ([]cgroupMatch, error) {
	d.proxies.mu.Lock()
	ours := slices.Clone(d.proxies.matches)
	d.proxies.mu.Unlock()
	there, err := readMatches(ns)
	if err != nil {
		return nil, err
	}
	return newest(there, ours), nil
}

// readMatches reads them back from the chain that has each once.
func readMatches(ns *netns.NS) ([]cgroupMatch, error) {
	c, err := dialNft(ns)
	if err != nil {
		return nil, err
	}
	defer c.CloseLasting()
	present, err := findTable(c, tableName)
	if err != nil || !present {
		return nil, err
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: tableName}
	rules, err := c.GetRules(table, &nftables.Chain{Name: chainMangleOutput, Table: table})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list rules of chain %s: %w", chainMangleOutput, err)
	}
	var out []cgroupMatch
	for _, r := range rules {
		// The library writes this expression and does not read it; the comment tells.
		comment, _ := userdata.GetString(r.UserData, userdata.TypeComment)
		var m cgroupMatch
		if _, err := fmt.Sscanf(comment, cgroupComment, &m.id, &m.level); err == nil {
			out = append(out, m)
		}
	}
	return out, nil
}

// cgroupComment begins the comment of a rule about a proxy's cgroup.
const cgroupComment = "cgroup %d at level %d:"

// byProxy makes a rule for what the proxy's sockets send: one for each way to know
// them. when and then are the rest of it.
func byProxy(proxies []cgroupMatch, comment string, when, then []expr.Any) (rules []rule) {
	if len(proxies) == 0 {
		return []rule{{comment, join(mark(expr.CmpOpEq, MarkProxy), when, then)}}
	}
	for _, m := range proxies {
		rules = append(rules, rule{fmt.Sprintf(cgroupComment, m.id, m.level) + " " + comment, join(when, m.exprs(), then)})
	}
	return rules
}

// original lets only packets through that go the way the first one went.
func original() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0}},
	}
}

// levelsOf returns the depths at which rules may have to look for dir's cgroup. The
// kernel counts from the root, and since 6.11 from that of the cgroup namespace of
// whoever writes the rule (nft_socket.c). A mount made in such a namespace begins
// at its root, so what is seen there is what newer kernels want.
func levelsOf(dir string) ([]uint32, error) {
	level, top, err := depth(dir)
	if err != nil {
		return nil, err
	}
	levels := []uint32{level}
	if top != rootCgroup {
		return levels, nil
	}
	if above := namespaceDepth(dir); above > 0 && above <= level {
		levels = append(levels, level-above)
	}
	return levels, nil
}

// rootCgroup is the number of the hierarchy's root.
const rootCgroup = 1

// maxDepth is the kernel's for this match.
const maxDepth = 255

// depth returns how deep dir is below the top of its mount, and the number of that.
func depth(dir string) (level uint32, top uint64, err error) {
	if top, err = cgroupID(dir); err != nil {
		return 0, 0, err
	}
	for level < maxDepth && top != rootCgroup {
		dir = filepath.Dir(dir)
		above, err := cgroupID(dir)
		if err != nil {
			break
		}
		level, top = level+1, above
	}
	return level, top, nil
}

// namespaceDepth is how deep the root of our cgroup namespace is; 0 also if that
// cannot be found out.
func namespaceDepth(near string) uint32 {
	own, err := cgroup.OfProcess(os.Getpid(), near)
	if err != nil {
		return 0
	}
	full, _, err := depth(own)
	if err != nil {
		return 0
	}
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::/")
		if !ok {
			continue
		}
		seen := uint32(0)
		if path != "" {
			seen = uint32(strings.Count(path, "/")) + 1
		}
		return full - min(seen, full)
	}
	return 0
}
