package app

import (
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// Config of the process. Every field is an environment variable of the
// reference or of our own, and a flag of the same name in kebab-case.
//
// Files: config.go (where values come from, in which order), config_table.go
// (the variables), config_value.go (their forms), config_check.go (what does
// not go together or has no meaning here), config_proxy.go (PROXY_CONFIG),
// config_threads.go (processors), config_log.go (RUST_LOG), config_help.go.
type Config struct {
	// Where the mesh is described and certified.
	XDSAddress, CAAddress         string // host:port or https://host:port; no XDSAddress: no control plane
	XDSRootCA, CARootCA           string // path of a PEM file, PEM text, or SYSTEM
	AltXDSHostname, AltCAHostname string
	AuthToken                     string // path or literal
	OnDemand                      bool   // ask for what connections need instead of everything
	LocalXDSPath, LocalXDS        string // a file, or its text
	SecretTTL                     time.Duration
	CRLPath                       string
	TrustDomain                   string
	TrustDomainAliases            string // comma-separated

	// Who this process is.
	Mode                         string      // shared or dedicated
	Workload                     WorkloadRef // whom a dedicated proxy serves
	ClusterID, ClusterDomain     string
	Network, NodeName, PodName   string
	PodNamespace, ServiceAccount string
	InstanceIP                   string

	// What it serves and how.
	EnableProxy        bool
	SOCKS5             bool
	InpodUDS           string
	InpodPortReuse     bool
	PacketMark         uint64
	OrigSrc            OrigSrc
	EnableOrigSrc      bool // from OrigSrc
	IPv6Enabled        bool
	LocalhostAppTunnel bool // PROXY protocol to an application's port goes to loopback
	ResponseBaggage    bool

	// DNS proxy.
	DNSCapture                bool
	DNSProxyAddr              string // "" is port 15053 of both loopback addresses
	PreferredServiceNamespace string

	// TLS.
	TLSRecords       string // "go": crypto/tls; "ambit": ztunnel/record after the handshake
	TLS12            bool
	CompliancePolicy string // "" or pqc

	// Tunnels and sockets.
	StreamWindow, ConnectionWindow, FrameSize int // HTTP/2
	PoolMaxStreams                            int
	PoolIdle                                  time.Duration
	TerminationDeadline                       time.Duration
	KeepaliveEnabled                          bool
	KeepaliveTime, KeepaliveInterval          time.Duration
	KeepaliveRetries                          int
	UserTimeout                               bool // TCP_USER_TIMEOUT

	// The process.
	Workers              int  // of the Go scheduler; 0 leaves it alone
	Adaptive             bool // only as many of them as there is work for
	LogFormat, LogLevel  string
	PolicyInfoLogging    bool
	AdminAddr, StatsAddr string
	ReadinessAddr        string

	XDSHeaders, CAHeaders map[string]string
	Metadata              map[string]any // ISTIO_META_*, ISTIO_METAJSON_*, proxyMetadata
	Warnings              []string       // what was asked for and has no effect or a risk

	threads threads
	log     logging
	grace   int // TERMINATION_GRACE_PERIOD_SECONDS
	fakeCA  bool
}

// The two values of PROXY_MODE.
const (
	shared    = "shared"
	dedicated = "dedicated"
)

// WorkloadRef names the one workload of a dedicated proxy.
type WorkloadRef struct{ Namespace, Name, ServiceAccount string }

func (r WorkloadRef) String() string {
	if r == (WorkloadRef{}) {
		return ""
	}
	return r.Namespace + "/" + r.Name + "/" + r.ServiceAccount
}

// Defaults are the reference's.
func Defaults() Config {
	return Config{
		XDSAddress: "https://istiod.istio-system.svc:15012",
		XDSRootCA:  "./var/run/secrets/istio/root-cert.pem", CARootCA: "./var/run/secrets/istio/root-cert.pem",
		AuthToken: "./var/run/secrets/tokens/istio-token", SecretTTL: 24 * time.Hour, TrustDomain: "cluster.local",
		Mode: shared, ClusterID: "Kubernetes", ClusterDomain: "cluster.local",
		EnableProxy: true, InpodUDS: "/var/run/ztunnel/ztunnel.sock", InpodPortReuse: true, PacketMark: 0x539, OrigSrc: OrigSrcAuto, EnableOrigSrc: true,
		IPv6Enabled: true, LocalhostAppTunnel: true, ResponseBaggage: true,
		DNSCapture: true, TLSRecords: "ambit",
		StreamWindow: 4 << 20, ConnectionWindow: 16 << 20, FrameSize: 1 << 20, PoolMaxStreams: 100, PoolIdle: 5 * time.Minute,
		TerminationDeadline: handoff.DrainTime, KeepaliveEnabled: true, KeepaliveTime: 180 * time.Second,
		KeepaliveInterval: 180 * time.Second, KeepaliveRetries: 9,
		Adaptive: true, LogFormat: "text", LogLevel: "info", AdminAddr: "localhost:15000", StatsAddr: ":15020", ReadinessAddr: ":15021",
	}
}

// ErrHelp was asked for and is printed.
var ErrHelp = flag.ErrHelp

// meshFile is where the reference looks for the mesh's configuration.
const meshFile = "./etc/istio/config/mesh"

// Parse gathers what each variable is set to and then sets them: a flag wins
// over the environment, this over PROXY_CONFIG, this over the mesh file, and
// all over the defaults. It reports every mistake at once.
func Parse(args, environ []string, out io.Writer) (Config, error) {
	c := Defaults()
	env := map[string]string{}
	for _, kv := range environ {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	if _, inCluster := env["KUBERNETES_SERVICE_HOST"]; !inCluster {
		c.XDSAddress = "https://localhost:15012"
	}
	if len(args) > 0 && args[0] == "help" {
		c.help(out)
		return c, ErrHelp
	}
	if len(args) > 0 && args[0] == "proxy" {
		args = args[1:] // the reference's subcommand
	}
	rest, err := c.flags(args, env, out)
	if err != nil {
		return c, err
	}
	var errs []error
	if len(rest) > 0 {
		errs = append(errs, fmt.Errorf("unexpected arguments %q: use `ztunnel [proxy] [flags]`, `ztunnel help` or `ztunnel version`", rest))
	}
	errs = append(errs, readProxyConfig(env)...)
	for _, s := range c.settings() {
		v, ok := env[s.env]
		for _, other := range s.aliases {
			if o, set := env[other]; set && !ok {
				v, ok = o, true
			}
		}
		if !ok {
			continue
		}
		if err := s.value.Set(v); err != nil {
			errs = append(errs, fmt.Errorf("%s=%q: %w", s.env, s.shown(v), err))
		}
	}
	errs = append(errs, c.prefixed(env)...)
	errs = append(errs, c.derive(env)...)
	errs = append(errs, c.check(env)...)
	return c, errors.Join(errs...)
}

// flags puts what the command line sets into env, over what is there.
func (c *Config) flags(args []string, env map[string]string, out io.Writer) (rest []string, err error) {
	fs := flag.NewFlagSet("ztunnel", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	for _, s := range c.settings() {
		set := func(v string) error { env[s.env] = v; return nil }
		if b, ok := s.value.(interface{ IsBoolFlag() bool }); ok && b.IsBoolFlag() {
			fs.BoolFunc(flagName(s.env), s.help, set)
		} else {
			fs.Func(flagName(s.env), s.help, set)
		}
	}
	err = fs.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		c.help(out)
	} else if err != nil {
		err = fmt.Errorf("%w (`ztunnel help` lists the flags)", err)
	}
	return fs.Args(), err
}

func flagName(env string) string { return strings.ReplaceAll(strings.ToLower(env), "_", "-") }

// prefixed takes the variables that come in families.
func (c *Config) prefixed(env map[string]string) (errs []error) {
	c.XDSHeaders, c.CAHeaders, c.Metadata = map[string]string{}, map[string]string{}, map[string]any{}
	for _, k := range slices.Sorted(maps.Keys(env)) {
		if name, ok := strings.CutPrefix(k, "XDS_HEADER_"); ok {
			c.XDSHeaders[strings.ToLower(name)] = env[k]
		} else if name, ok := strings.CutPrefix(k, "CA_HEADER_"); ok {
			c.CAHeaders[strings.ToLower(name)] = env[k]
		} else if name, ok := strings.CutPrefix(k, "ISTIO_META_"); ok {
			c.Metadata[name] = env[k]
		} else if name, ok := strings.CutPrefix(k, "ISTIO_METAJSON_"); ok {
			v, err := parseJSON(env[k])
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", k, err))
				continue
			}
			c.Metadata[name] = v
		}
	}
	return errs
}

// derive computes what follows from several variables.
func (c *Config) derive(env map[string]string) (errs []error) {
	if _, set := env["CONNECTION_TERMINATION_DEADLINE"]; !set && c.grace > 0 {
		// Leave time to end in order before the kill.
		n := max(c.grace-1, 1)
		if c.grace > 10 {
			n = c.grace - 5
		}
		c.TerminationDeadline = time.Duration(n) * time.Second
	}
	if _, set := env["CA_ADDRESS"]; !set {
		if c.CAAddress = c.XDSAddress; c.CAAddress == "" {
			c.CAAddress = Defaults().XDSAddress
		}
	}
	if _, set := env["LOG_LEVEL"]; !set && c.log.rust != "" {
		spec, unknown := rustLog(c.log.rust)
		c.LogLevel = spec
		if len(unknown) > 0 {
			c.warn("RUST_LOG: %s: no such target here, nothing of it is logged", strings.Join(unknown, ", "))
		}
	}
	if env["GOMAXPROCS"] == "" {
		n, err := c.threads.workers()
		if err != nil {
			errs = append(errs, err)
		}
		c.Workers = n
	}
	// Who sets a number means it.
	c.Adaptive = c.Adaptive && env["GOMAXPROCS"] == "" && c.threads.auto()
	c.EnableOrigSrc = c.OrigSrc != OrigSrcOff
	return errs
}

func (c *Config) warn(format string, args ...any) {
	c.Warnings = append(c.Warnings, fmt.Sprintf(format, args...))
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

func (c *Config) liveness() sockopt.Liveness {
	return sockopt.Liveness{Off: !c.KeepaliveEnabled, Idle: c.KeepaliveTime, Interval: c.KeepaliveInterval, Count: c.KeepaliveRetries, UserTimeout: c.UserTimeout}
}

func (c *Config) windows() hbone.Windows {
	return hbone.Windows{Stream: c.StreamWindow, Connection: c.ConnectionWindow, Frame: c.FrameSize}
}

// serverTLS is how the control plane is reached: as any server, and under the
// same rule for key exchange as the mesh itself.
func (c *Config) serverTLS(setting, roots, target, name string) func() (*tls.Config, error) {
	get := serverRoots(setting, roots, target, name)
	if c.CompliancePolicy != "pqc" {
		return get
	}
	return func() (*tls.Config, error) {
		cfg, err := get()
		if err == nil {
			cfg.MinVersion, cfg.CurvePreferences = tls.VersionTLS13, []tls.CurveID{tls.X25519MLKEM768}
		}
		return cfg, err
	}
}
