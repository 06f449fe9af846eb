package app

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/xds/boot"
)

// Config of the process. Every field is an environment variable of the
// reference, and a flag of the same name in kebab-case.
type Config struct {
	XDSAddress, CAAddress         string // host:port or https://host:port
	XDSRootCA, CARootCA           string // path of a PEM file, PEM text, or SYSTEM
	AltXDSHostname, AltCAHostname string
	AuthToken                     string // path or literal
	ClusterID, Network            string
	NodeName, PodName             string
	PodNamespace, ServiceAccount  string
	InstanceIP, TrustDomain       string
	TrustDomainAliases            string // comma-separated
	InpodUDS                      string
	PacketMark                    uint64
	EnableOrigSrc                 bool
	IPv6Enabled                   bool
	ResponseBaggage               bool
	SecretTTL                     time.Duration
	PoolMaxStreams                int
	PoolIdle                      time.Duration
	TerminationDeadline           time.Duration
	LogFormat, LogLevel           string
	TLSRecords                    string // "go": crypto/tls; "ambit": ztunnel/record after the handshake
	AdminAddr, StatsAddr          string
	ReadinessAddr                 string

	XDSHeaders, CAHeaders map[string]string
	Metadata              map[string]string // ISTIO_META_*
	Warnings              []string          // settings that this build does not follow
}

// unsupported settings of the reference change behaviour, so that ignoring
// them in silence would mislead: these are named at start, unless they ask for
// what this build does anyway.
var unsupported = []struct {
	name string
	same []string // values that make no difference
}{
	{"XDS_ON_DEMAND", []string{"false"}},
	{"LOCAL_XDS_PATH", nil},
	{"LOCAL_XDS", nil},
	{"FAKE_CA", []string{"false"}},
	{"TLS12_ENABLED", []string{"false"}},
	{"COMPLIANCE_POLICY", nil},
	{"CRL_PATH", nil},
	{"ISTIO_META_DNS_CAPTURE", []string{"false"}},
	{"UNSTABLE_ENABLE_SOCKS5", []string{"false"}},
	{"AMBIENT_ENABLE_MULTI_NETWORK", []string{"false"}},
	{"USER_TIMEOUT_ENABLED", []string{"false"}},
	{"PROXY_CONFIG", nil},
	{"PROXY_MODE", []string{"shared"}},
	{"KEEPALIVE_ENABLED", []string{"true"}},
	{"KEEPALIVE_TIME", []string{"180s", "3m", "3m0s", "180"}},
	{"KEEPALIVE_INTERVAL", []string{"180s", "3m", "3m0s", "180"}},
	{"KEEPALIVE_RETRIES", []string{"9"}},
	{"INPOD_PORT_REUSE", []string{"true"}},
	{"HTTP2_STREAM_WINDOW_SIZE", nil},
	{"HTTP2_CONNECTION_WINDOW_SIZE", nil},
	{"HTTP2_FRAME_SIZE", nil},
	{"AUTHZ_POLICY_INFO_LOGGING", []string{"false"}},
}

type setting struct {
	env, help string
	value     flag.Value
}

type stringValue struct{ p *string }

func (v stringValue) Set(s string) error { *v.p = s; return nil }
func (v stringValue) String() string {
	if v.p == nil {
		return ""
	}
	return *v.p
}

// secretValue is set and never shown, for instance as a default in the usage.
type secretValue struct{ p *string }

func (v secretValue) Set(s string) error { *v.p = s; return nil }
func (secretValue) String() string       { return "" }

type parsed[T any] struct {
	p     *T
	parse func(string) (T, error)
}

func (v parsed[T]) Set(s string) error {
	x, err := v.parse(s)
	if err != nil {
		return err
	}
	*v.p = x
	return nil
}

func (v parsed[T]) String() string {
	if v.p == nil {
		return ""
	}
	return fmt.Sprint(*v.p)
}

func (v parsed[T]) IsBoolFlag() bool { _, ok := any(v.p).(*bool); return ok }

func (c *Config) settings() []setting {
	str := func(p *string) flag.Value { return stringValue{p} }
	boolean := func(p *bool) flag.Value { return parsed[bool]{p, strconv.ParseBool} }
	number := func(p *int) flag.Value { return parsed[int]{p, strconv.Atoi} }
	duration := func(p *time.Duration) flag.Value { return parsed[time.Duration]{p, parseDuration} }
	return []setting{
		{"XDS_ADDRESS", "control plane, host:port", str(&c.XDSAddress)},
		{"CA_ADDRESS", "certificate authority, host:port; the control plane if empty", str(&c.CAAddress)},
		{"XDS_ROOT_CA", "roots of the control plane: a file, PEM text, or SYSTEM", str(&c.XDSRootCA)},
		{"CA_ROOT_CA", "roots of the certificate authority's server: a file, PEM text, or SYSTEM", str(&c.CARootCA)},
		{"ALT_XDS_HOSTNAME", "name expected in the control plane's certificate", str(&c.AltXDSHostname)},
		{"ALT_CA_HOSTNAME", "name expected in the authority's certificate", str(&c.AltCAHostname)},
		{"AUTH_TOKEN", "this node's token: a file or the token", secretValue{&c.AuthToken}},
		{"CLUSTER_ID", "cluster of this node", str(&c.ClusterID)},
		{"NETWORK", "network of this node", str(&c.Network)},
		{"NODE_NAME", "name of this node", str(&c.NodeName)},
		{"POD_NAME", "name of the pod of this process", str(&c.PodName)},
		{"POD_NAMESPACE", "namespace of the pod of this process", str(&c.PodNamespace)},
		{"SERVICE_ACCOUNT", "service account of this process", str(&c.ServiceAccount)},
		{"INSTANCE_IP", "address of the pod of this process", str(&c.InstanceIP)},
		{"TRUST_DOMAIN", "trust domain", str(&c.TrustDomain)},
		{"TRUST_DOMAIN_ALIASES", "further trust domains accepted from clients, comma-separated", str(&c.TrustDomainAliases)},
		{"INPOD_UDS", "socket of the node agent", str(&c.InpodUDS)},
		{"PACKET_MARK", "mark of the proxy's sockets in pods", parsed[uint64]{&c.PacketMark, func(s string) (uint64, error) { return strconv.ParseUint(s, 0, 32) }}},
		{"ENABLE_ORIG_SRC", "show applications their clients' addresses", boolean(&c.EnableOrigSrc)},
		{"IPV6_ENABLED", "listen for IPv6 in pods", boolean(&c.IPv6Enabled)},
		{"ENABLE_RESPONSE_BAGGAGE", "describe the destination in answers to CONNECT", boolean(&c.ResponseBaggage)},
		{"SECRET_TTL", "lifetime asked for certificates", duration(&c.SecretTTL)},
		{"POOL_MAX_STREAMS_PER_CONNECTION", "streams per tunnel", number(&c.PoolMaxStreams)},
		{"POOL_UNUSED_RELEASE_TIMEOUT", "idle time after which a tunnel is closed", duration(&c.PoolIdle)},
		{"CONNECTION_TERMINATION_DEADLINE", "time connections get at the end", duration(&c.TerminationDeadline)},
		{"LOG_FORMAT", "text or json", str(&c.LogFormat)},
		{"TLS_RECORDS", "who protects TLS records after the handshake: ambit (many per system call) or go (crypto/tls; chosen by itself in FIPS mode)", str(&c.TLSRecords)},
		{"LOG_LEVEL", "level, or level,scope=level,...", str(&c.LogLevel)},
		{"ADMIN_ADDR", "address of the admin port", str(&c.AdminAddr)},
		{"STATS_ADDR", "address of the metrics port", str(&c.StatsAddr)},
		{"READINESS_ADDR", "address of the readiness port", str(&c.ReadinessAddr)},
	}
}

// parseDuration also takes bare seconds, as TERMINATION_GRACE_PERIOD_SECONDS does.
func parseDuration(s string) (time.Duration, error) {
	if n, err := strconv.Atoi(s); err == nil {
		return time.Duration(n) * time.Second, nil
	}
	return time.ParseDuration(s)
}

// Defaults are the reference's.
func Defaults() Config {
	return Config{
		XDSAddress: "https://istiod.istio-system.svc:15012",
		XDSRootCA:  "./var/run/secrets/istio/root-cert.pem", CARootCA: "./var/run/secrets/istio/root-cert.pem",
		AuthToken: "./var/run/secrets/tokens/istio-token", ClusterID: "Kubernetes", TrustDomain: "cluster.local",
		InpodUDS: "/var/run/ztunnel/ztunnel.sock", PacketMark: 0x539, EnableOrigSrc: true, IPv6Enabled: true, ResponseBaggage: true,
		SecretTTL: 24 * time.Hour, PoolMaxStreams: 100, PoolIdle: 5 * time.Minute, TerminationDeadline: handoff.DrainTime,
		LogFormat: "text", LogLevel: "info", TLSRecords: "ambit",
		AdminAddr: "localhost:15000", StatsAddr: ":15020", ReadinessAddr: ":15021",
	}
}

// ErrHelp was asked for and is printed.
var ErrHelp = flag.ErrHelp

// Parse reads the environment, then the flags, which win.
func Parse(args []string, environ []string, out io.Writer) (Config, error) {
	c := Defaults()
	env := map[string]string{}
	for _, kv := range environ {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	c.aliases(env)
	fs := flag.NewFlagSet("ztunnel", flag.ContinueOnError)
	fs.SetOutput(out)
	var errs []error
	for _, s := range c.settings() {
		if v, ok := env[s.env]; ok {
			if err := s.value.Set(v); err != nil {
				errs = append(errs, fmt.Errorf("%s=%q: %w", s.env, v, err))
			}
		}
		fs.Var(s.value, flagName(s.env), s.help+" (env "+s.env+")")
	}
	if len(args) > 0 && args[0] == "proxy" {
		args = args[1:] // the reference's subcommand
	}
	if err := fs.Parse(args); err != nil {
		return c, err
	}
	if fs.NArg() > 0 {
		errs = append(errs, fmt.Errorf("unexpected arguments %q: use `ztunnel [proxy] [flags]` or `ztunnel version`", fs.Args()))
	}
	c.fromEnviron(env)
	return c, errors.Join(append(errs, c.validate()...)...)
}

func flagName(env string) string { return strings.ReplaceAll(strings.ToLower(env), "_", "-") }

// aliases fills in names that the reference reads from elsewhere.
func (c *Config) aliases(env map[string]string) {
	if _, ok := env["CLUSTER_ID"]; !ok {
		if v, ok := env["ISTIO_META_CLUSTER_ID"]; ok {
			env["CLUSTER_ID"] = v
		}
	}
	if _, ok := env["LOG_LEVEL"]; !ok {
		if v, ok := env["RUST_LOG"]; ok {
			env["LOG_LEVEL"] = v
		}
	}
	if v, err := strconv.Atoi(env["TERMINATION_GRACE_PERIOD_SECONDS"]); err == nil {
		// Leave time to end in order before the kill.
		n := max(v-1, 1)
		if v > 10 {
			n = v - 5
		}
		c.TerminationDeadline = time.Duration(n) * time.Second
	}
}

func (c *Config) fromEnviron(env map[string]string) {
	c.XDSHeaders, c.CAHeaders, c.Metadata = map[string]string{}, map[string]string{}, map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(env)) {
		if name, ok := strings.CutPrefix(k, "XDS_HEADER_"); ok {
			c.XDSHeaders[strings.ToLower(name)] = env[k]
		} else if name, ok := strings.CutPrefix(k, "CA_HEADER_"); ok {
			c.CAHeaders[strings.ToLower(name)] = env[k]
		} else if name, ok := strings.CutPrefix(k, "ISTIO_META_"); ok {
			c.Metadata[name] = env[k]
		}
	}
	for _, u := range unsupported {
		if v := env[u.name]; v != "" && !slices.Contains(u.same, strings.ToLower(v)) {
			c.Warnings = append(c.Warnings, fmt.Sprintf("%s=%s is not supported by this build and has no effect", u.name, v))
		}
	}
	// The agent takes a pod's rules away a while after it told the proxy, and
	// with them the way back of connections that still drain.
	if d := c.TerminationDeadline; d > handoff.DrainTime {
		c.Warnings = append(c.Warnings, fmt.Sprintf(
			"CONNECTION_TERMINATION_DEADLINE is %s: connections of pods that leave the mesh get that long only if ambit-node runs with --unenrol-drain=%s or more (its default is %s)",
			d, d, handoff.DrainTime))
	}
}

func (c *Config) validate() (errs []error) {
	bad := func(env, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: "+format, append([]any{env}, args...)...))
	}
	if c.CAAddress == "" {
		c.CAAddress = c.XDSAddress
	}
	for _, a := range []struct {
		env string
		p   *string
	}{{"XDS_ADDRESS", &c.XDSAddress}, {"CA_ADDRESS", &c.CAAddress}} {
		hp, err := hostPort(*a.p)
		if err != nil {
			bad(a.env, "%v", err)
		}
		*a.p = hp
	}
	if c.NodeName == "" {
		bad("NODE_NAME", "is empty; set it to this node's name (spec.nodeName), which selects this node's workloads")
	}
	if c.InpodUDS == "" {
		bad("INPOD_UDS", "is empty; set it to the node agent's socket")
	}
	if c.PoolMaxStreams < 1 {
		bad("POOL_MAX_STREAMS_PER_CONNECTION", "%d is not positive", c.PoolMaxStreams)
	}
	if c.SecretTTL <= 0 || c.TerminationDeadline < 0 {
		bad("SECRET_TTL, CONNECTION_TERMINATION_DEADLINE", "durations must be positive")
	}
	if c.TLSRecords != "go" && c.TLSRecords != "ambit" {
		bad("TLS_RECORDS", "%q: want go or ambit", c.TLSRecords)
	}
	if err := boot.CheckLogging(c.LogFormat, c.LogLevel); err != nil {
		bad("LOG_FORMAT, LOG_LEVEL", "%v", err)
	}
	return errs
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

// instanceIP is the address in the node id, the reference's stand-in if unset.
func (c *Config) instanceIP() string {
	if _, err := netip.ParseAddr(c.InstanceIP); err != nil {
		return "1.1.1.1"
	}
	return c.InstanceIP
}

// token reads the node's token anew: it is rotated on disk.
func (c *Config) token() (string, error) {
	b, err := os.ReadFile(c.AuthToken)
	if err == nil {
		return strings.TrimSpace(string(b)), nil
	}
	// A JWT has two dots and is no path that exists; a path that does not
	// exist must not be sent as a token.
	if strings.Count(c.AuthToken, ".") == 2 && !strings.ContainsAny(c.AuthToken, "/ ") {
		return c.AuthToken, nil
	}
	return "", fmt.Errorf("AUTH_TOKEN: %w (the node's token must be mounted or given)", err)
}
