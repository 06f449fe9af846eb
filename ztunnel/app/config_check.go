package app

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/xds/boot"
)

// maxWindow is the largest flow-control window of HTTP/2 (RFC 9113 section
// 6.9.1).
const maxWindow = 1<<31 - 1

// check refuses what is wrong, contradictory or would be unsafe, and warns of
// what has no effect.
func (c *Config) check(env map[string]string) (errs []error) {
	bad := func(env, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: "+format, append([]any{env}, args...)...))
	}
	c.checkAddresses(env, bad)
	c.checkMode(bad)
	c.checkTransport(bad)
	if c.fakeCA {
		bad("FAKE_CA", "is for the reference's own tests: its key is public, so anybody could pose as any workload; run ambitd or another authority")
	}
	if c.OnDemand && c.DNSCapture {
		bad("XDS_ON_DEMAND", "does not go with the DNS proxy, which must know every name; set ISTIO_META_DNS_CAPTURE=false")
	}
	if c.OnDemand && c.XDSAddress == "" {
		bad("XDS_ON_DEMAND", "needs a control plane to ask; set XDS_ADDRESS")
	}
	if _, err := c.dnsAddrs(); err != nil {
		bad("ISTIO_META_DNS_PROXY_ADDR", "%v", err)
	}
	if _, err := netip.ParseAddr(c.InstanceIP); c.OnDemand && c.Mode == dedicated && err != nil {
		bad("XDS_ON_DEMAND", "in dedicated mode the workload is asked for by its address; set INSTANCE_IP")
	}
	if !c.EnableProxy && !c.DNSCapture {
		bad("ENABLE_PROXY", "is false and DNS capture is off: nothing would be served")
	}
	if c.LocalXDSPath != "" && c.LocalXDS != "" {
		bad("LOCAL_XDS", "LOCAL_XDS_PATH is set too; set one of them")
	}
	if c.XDSAddress == "" && c.LocalXDSPath == "" && c.LocalXDS == "" {
		bad("XDS_ADDRESS", "is empty and there is no LOCAL_XDS_PATH: nothing would describe the mesh")
	}
	if c.SecretTTL <= 0 || c.TerminationDeadline < 0 {
		bad("SECRET_TTL, CONNECTION_TERMINATION_DEADLINE", "durations must be positive")
	}
	if err := boot.CheckLogging(c.LogFormat, c.LogLevel); err != nil {
		bad("LOG_FORMAT, LOG_LEVEL", "%v", err)
	}
	// The agent takes a pod's rules away a while after it told the proxy, and
	// with them the way back of connections that still drain.
	if d := c.TerminationDeadline; d > handoff.DrainTime && c.Mode != dedicated {
		c.warn("CONNECTION_TERMINATION_DEADLINE is %s: connections of pods that leave the mesh get that long only if ambit-node runs with --unenrol-drain=%s or more (its default is %s)",
			d, d, handoff.DrainTime)
	}
	return errs
}

type complain func(env, format string, args ...any)

func (c *Config) checkAddresses(env map[string]string, bad complain) {
	if v, set := env["CA_ADDRESS"]; set && v == "" {
		bad("CA_ADDRESS", "is empty: without an authority there are no certificates and no mTLS; leave it unset for the control plane's")
	}
	for _, a := range []struct {
		env string
		p   *string
	}{{"XDS_ADDRESS", &c.XDSAddress}, {"CA_ADDRESS", &c.CAAddress}} {
		if *a.p == "" {
			continue
		}
		hp, err := hostPort(*a.p)
		if err != nil {
			bad(a.env, "%v", err)
		}
		*a.p = hp
	}
}

func (c *Config) checkMode(bad complain) {
	switch c.Mode {
	case shared:
		if c.NodeName == "" {
			bad("NODE_NAME", "is empty; set it to this node's name (spec.nodeName), which selects this node's workloads")
		}
		if c.InpodUDS == "" {
			bad("INPOD_UDS", "is empty; set it to the node agent's socket")
		}
		if c.Workload != (WorkloadRef{}) {
			c.warn("PROXY_WORKLOAD_INFO has no effect in shared mode: the node agent says whom to serve")
		}
	case dedicated:
		if c.Workload == (WorkloadRef{}) {
			bad("PROXY_WORKLOAD_INFO", "is empty; a dedicated proxy must be told whom it serves, as namespace/name/serviceaccount")
		}
	default:
		bad("PROXY_MODE", "%q: want shared or dedicated", c.Mode)
	}
}

func (c *Config) checkTransport(bad complain) {
	if c.PoolMaxStreams < 1 {
		bad("POOL_MAX_STREAMS_PER_CONNECTION", "%d is not positive", c.PoolMaxStreams)
	}
	// A peer may send 64 KiB on a new connection before it has read our
	// SETTINGS, and the limit of a frame is between 16 KiB and 16 MiB (RFC 9113
	// sections 6.9.2 and 6.5.2).
	for _, w := range []struct {
		env string
		n   int
	}{{"HTTP2_STREAM_WINDOW_SIZE", c.StreamWindow}, {"HTTP2_CONNECTION_WINDOW_SIZE", c.ConnectionWindow}} {
		if w.n < 1<<16-1 || w.n > maxWindow {
			bad(w.env, "%d is not between 65535 and %d", w.n, maxWindow)
		}
	}
	if c.FrameSize < 1<<14 || c.FrameSize > 1<<24-1 {
		bad("HTTP2_FRAME_SIZE", "%d is not between 16384 and 16777215", c.FrameSize)
	}
	if c.ConnectionWindow < c.StreamWindow {
		c.warn("HTTP2_CONNECTION_WINDOW_SIZE is smaller than HTTP2_STREAM_WINDOW_SIZE: one stream that is not read can stop its tunnel")
	}
	if c.KeepaliveEnabled && (c.KeepaliveTime <= 0 || c.KeepaliveInterval <= 0 || c.KeepaliveRetries < 1 || c.KeepaliveRetries > 127) {
		bad("KEEPALIVE_TIME, KEEPALIVE_INTERVAL, KEEPALIVE_RETRIES", "must be positive, and at most 127 retries")
	}
	if c.TLSRecords != "go" && c.TLSRecords != "ambit" {
		bad("TLS_RECORDS", "%q: want go or ambit", c.TLSRecords)
	}
	switch {
	case c.CompliancePolicy != "" && c.CompliancePolicy != "pqc":
		bad("COMPLIANCE_POLICY", "%q: want pqc or nothing", c.CompliancePolicy)
	case c.CompliancePolicy == "pqc" && c.TLS12:
		c.TLS12 = false
		c.warn("TLS12_ENABLED has no effect with COMPLIANCE_POLICY=pqc: TLS 1.2 has no such key exchange")
	}
}

// hostPort takes host:port and https://host:port.
func hostPort(s string) (string, error) {
	if u, err := url.Parse(s); err == nil && u.Host != "" && strings.Contains(s, "://") {
		if u.Scheme != "https" {
			return "", fmt.Errorf("%q: the scheme must be https", s)
		}
		s = u.Host
		if u.Port() == "" {
			s = net.JoinHostPort(u.Hostname(), "443")
		}
	}
	if _, _, err := net.SplitHostPort(s); err != nil {
		return "", fmt.Errorf("%q is not host:port: %w", s, err)
	}
	return s, nil
}
