// Package redirect steers a pod's TCP connections and DNS to the node proxy's listeners
// with nftables and two routes inside the pod's network namespace.
//
//	app ── connect ──▶ nat output ──▶ 127.0.0.1:15001 (SO_ORIGINAL_DST: where it wanted to go)
//	network ─────────▶ nat prerouting ──▶ pod:15006   (all ports but 15008)
//	proxy, as the client ── lo ──▶ app; replies find the proxy by mark, not by address
//	app ── port 53 ──▶ nat output ──▶ 127.0.0.1:15053, UDP and TCP, where PodRules.DNS asks for it
//
// The rules are those of Istio ambient, in one table `inet ambit` per pod, which
// one netlink transaction replaces as a whole: there is no moment with half of
// them. Proxy sockets carry the mark 0x539. A mark is no proof of identity (a
// pod with CAP_NET_RAW can set it), so rules tell them by cgroup where they can.
//
// Hooks does the same with eBPF programs and no rules: connect(2) itself is given
// the proxy's address (package bpf), and who the proxy is, its cgroup tells. Both
// have the methods that an agent needs.
//
// A Dataplane holds no state but who the proxy is, and reads that too from rules
// that are there: everything is read from and written to the kernel, so that any
// agent can continue another one's work. Its methods may run
// at the same time for different namespaces. The package does not know which
// pods are enrolled, or why.
package redirect

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// Ports of the proxy's listeners inside the pod.
const (
	PortOutbound = 15001
	PortInbound  = 15006
	PortHBONE    = 15008
	PortDNS      = 15053
)

const (
	// MarkProxy is on every socket of the proxy's.
	MarkProxy = 0x539
	// MarkReturn is on packets and connections that must go back to the proxy
	// although their destination is a remote address.
	MarkReturn = 0x111
	// MarkMask leaves the upper bits of a mark to others.
	MarkMask = 0xfff
)

const (
	tableName    = "ambit"
	routeTable   = 100
	rulePriority = 32764 // just before "main"
)

// Probe addresses stand for the node's own processes (kubelet) on connections to
// pods, as in Istio; see Host.
var (
	defaultProbeV4 = netip.MustParseAddr("169.254.7.127")
	defaultProbeV6 = netip.MustParseAddr("fd16:9254:7127:1337:ffff:ffff:ffff:ffff")
)

// Config is common to all pods of a node.
type Config struct {
	ProbeV4 netip.Addr   // default 169.254.7.127
	ProbeV6 netip.Addr   // default fd16:9254:7127:1337:ffff:ffff:ffff:ffff
	Logger  *slog.Logger // nil: none
}

func (c Config) withDefaults() Config {
	if !c.ProbeV4.IsValid() {
		c.ProbeV4 = defaultProbeV4
	}
	if !c.ProbeV6.IsValid() {
		c.ProbeV6 = defaultProbeV6
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c Config) validate() error {
	var errs []error
	if !c.ProbeV4.Is4() {
		errs = append(errs, fmt.Errorf("probe address %v is not an IPv4 address", c.ProbeV4))
	}
	if !c.ProbeV6.Is6() || c.ProbeV6.Is4In6() {
		errs = append(errs, fmt.Errorf("probe address %v is not an IPv6 address", c.ProbeV6))
	}
	return errors.Join(errs...)
}

// PodRules is what one pod needs.
type PodRules struct {
	BypassInbound bool // capture outbound connections only
	DNS           bool // also port 53, to the proxy's resolver
	IPv6          bool // the pod has an IPv6 address: fail if it cannot be captured
	Accelerate    bool // connections may do without the proxy under leases; Hooks only

	// Connections to these ports are not captured: others' and the pod's own ones.
	ExcludeOutbound, ExcludeInbound Ports
}

// ErrDrift reports rules that are not, or no longer, what Apply makes.
var ErrDrift = errors.New("redirection differs from what it should be")

// UnsupportedError names what the kernel lacks.
type UnsupportedError struct {
	Feature string // what is missing, with the kernel option that has it
	Err     error
}

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("the kernel does not support %s: %v", e.Feature, e.Err)
}

func (e *UnsupportedError) Unwrap() error { return e.Err }

// Dataplane writes rules.
type Dataplane struct {
	cfg     Config
	proxies proxySet
}

// New checks cfg.
func New(cfg Config) (*Dataplane, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("configure redirection: %w", err)
	}
	return &Dataplane{cfg: cfg}, nil
}

// Apply makes ns's redirection what rules say. Routes come before the rules that
// need them. What is right already is not touched.
func (d *Dataplane) Apply(ns *netns.NS, rules PodRules) error {
	if err := d.refuse(ns); err != nil {
		return err
	}
	migrateQueues(ns, d.cfg.Logger)
	proxies, err := d.known(ns)
	if err != nil {
		return err
	}
	if err := d.apply(ns, d.chains(rules, proxies, true), rules.IPv6); err != nil {
		return err
	}
	d.rememberHalfClosed(ns) // the sysctls come with conntrack
	return nil
}

// Release stops capturing new connections and keeps what the established ones
// need to find their way, so that the proxy can drain.
func (d *Dataplane) Release(ns *netns.NS) error {
	present, err := tablePresent(ns, tableName)
	if err != nil || !present {
		return err
	}
	proxies, err := d.known(ns)
	if err != nil {
		return err
	}
	return d.apply(ns, d.chains(PodRules{}, proxies, false), false)
}

func (d *Dataplane) apply(ns *netns.NS, chains []chain, needV6 bool) error {
	if err := applyRoutes(ns, needV6); err != nil {
		return err
	}
	err := checkTable(ns, tableName, chains)
	if err == nil {
		return nil
	}
	if !errors.Is(err, ErrDrift) {
		return err
	}
	return replaceTable(ns, tableName, chains)
}

// Check returns nil if Apply would change nothing, and otherwise an ErrDrift that
// says what differs.
func (d *Dataplane) Check(ns *netns.NS, rules PodRules) error {
	if err := checkRoutes(ns, rules.IPv6); err != nil {
		return err
	}
	proxies, err := d.known(ns)
	if err != nil {
		return err
	}
	return checkTable(ns, tableName, d.chains(rules, proxies, true))
}

// Present reports whether ns has redirection of any sort.
func (d *Dataplane) Present(ns *netns.NS) (bool, error) { return tablePresent(ns, tableName) }

// Remove takes everything away. Doing it twice is no error.
func (d *Dataplane) Remove(ns *netns.NS) error {
	// Capture ends before the way back does.
	if err := removeTable(ns, tableName); err != nil {
		return err
	}
	return removeRoutes(ns)
}
