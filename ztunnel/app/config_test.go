package app

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
)

// minimal is what a shared proxy must be told.
var minimal = []string{"NODE_NAME=n1", "XDS_ADDRESS=x:1"}

// variables has a row for each variable of the reference and of our own: a
// value, what it is afterwards, or how it is refused or commented.
var variables = []struct {
	env, value string
	with       string // further variables, space-separated
	get        func(*Config) any
	want       any
	err, warn  string
}{
	{env: "PROXY_MODE", value: "dedicated", with: "PROXY_WORKLOAD_INFO=a/b/c", get: func(c *Config) any { return c.Mode }, want: dedicated},
	{env: "PROXY_MODE", value: "sidecar", err: "want shared or dedicated"},
	{env: "PROXY_WORKLOAD_INFO", value: "ns/vm/sa", with: "PROXY_MODE=dedicated", get: func(c *Config) any { return c.Workload }, want: WorkloadRef{"ns", "vm", "sa"}},
	{env: "PROXY_WORKLOAD_INFO", value: "ns/vm", err: "want namespace/name/serviceaccount"},
	{env: "PROXY_WORKLOAD_INFO", value: "ns/vm/sa", warn: "no effect in shared mode"},
	{env: "PROXY_WORKLOAD_INFO", value: "", with: "PROXY_MODE=dedicated", err: "must be told whom it serves"},
	{env: "XDS_ADDRESS", value: "https://ambitd.ambit-system.svc:15012", get: func(c *Config) any { return c.XDSAddress + " " + c.CAAddress }, want: "ambitd.ambit-system.svc:15012 ambitd.ambit-system.svc:15012"},
	{env: "XDS_ADDRESS", value: "", with: "LOCAL_XDS_PATH=/f", get: func(c *Config) any { return c.XDSAddress + " " + c.CAAddress }, want: " istiod.istio-system.svc:15012"},
	{env: "XDS_ADDRESS", value: "", err: "nothing would describe the mesh"},
	{env: "XDS_ADDRESS", value: "http://x:1", err: "scheme must be https"},
	{env: "CA_ADDRESS", value: "ca.x:443", get: func(c *Config) any { return c.CAAddress }, want: "ca.x:443"},
	{env: "CA_ADDRESS", value: "", err: "there are no certificates"},
	{env: "XDS_ROOT_CA", value: "SYSTEM", get: func(c *Config) any { return c.XDSRootCA }, want: "SYSTEM"},
	{env: "CA_ROOT_CA", value: "/ca.pem", get: func(c *Config) any { return c.CARootCA }, want: "/ca.pem"},
	{env: "ALT_XDS_HOSTNAME", value: "h", get: func(c *Config) any { return c.AltXDSHostname }, want: "h"},
	{env: "ALT_CA_HOSTNAME", value: "h", get: func(c *Config) any { return c.AltCAHostname }, want: "h"},
	{env: "AUTH_TOKEN", value: "/t", get: func(c *Config) any { return c.AuthToken }, want: "/t"},
	{env: "XDS_ON_DEMAND", value: "true", with: "ISTIO_META_DNS_CAPTURE=false", get: func(c *Config) any { return c.OnDemand }, want: true},
	{env: "XDS_ON_DEMAND", value: "true", err: "does not go with the DNS proxy"},
	{env: "LOCAL_XDS_PATH", value: "/f", get: func(c *Config) any { return c.LocalXDSPath }, want: "/f"},
	{env: "LOCAL_XDS", value: "services: []", get: func(c *Config) any { return c.LocalXDS }, want: "services: []"},
	{env: "LOCAL_XDS", value: "services: []", with: "LOCAL_XDS_PATH=/f", err: "set one of them"},
	{env: "SECRET_TTL", value: "1h", get: func(c *Config) any { return c.SecretTTL }, want: time.Hour},
	{env: "SECRET_TTL", value: "soon", err: "SECRET_TTL"},
	{env: "CRL_PATH", value: "/crl", get: func(c *Config) any { return c.CRLPath }, want: "/crl"},
	{env: "FAKE_CA", value: "true", err: "its key is public"},
	{env: "FAKE_CA", value: "false", get: func(c *Config) any { return c.fakeCA }, want: false},
	{env: "TRUST_DOMAIN", value: "td", get: func(c *Config) any { return c.TrustDomain }, want: "td"},
	{env: "TRUST_DOMAIN_ALIASES", value: "a,b", get: func(c *Config) any { return fmt.Sprint(c.trustDomainAliases()) }, want: "[a b]"},
	{env: "PROXY_CONFIG", value: "discoveryAddress: d:1\nproxyAdminPort: 1\nstatsPort: 2\nconcurrency: 3\nproxyMetadata: {ISTIO_META_DNS_CAPTURE: 'false', K: v}\nother: x", with: "XDS_ADDRESS=x:2",
		get: func(c *Config) any {
			return fmt.Sprint(c.XDSAddress, c.AdminAddr, c.StatsAddr, c.Workers, c.DNSCapture, c.Metadata)
		},
		want: "x:2localhost:1:23 false map[DNS_CAPTURE:false K:v]"},
	{env: "PROXY_CONFIG", value: "statusPort: 4\nterminationDrainDuration: 4s", get: func(c *Config) any { return fmt.Sprint(c.StatsAddr, c.TerminationDeadline) }, want: ":44s"},
	{env: "PROXY_CONFIG", value: "concurrency: [", err: "PROXY_CONFIG"},
	{env: "CLUSTER_ID", value: "c", with: "ISTIO_META_CLUSTER_ID=m", get: func(c *Config) any { return c.ClusterID }, want: "c"},
	{env: "ISTIO_META_CLUSTER_ID", value: "m", get: func(c *Config) any { return c.ClusterID }, want: "m"},
	{env: "CLUSTER_DOMAIN", value: "d", get: func(c *Config) any { return c.ClusterDomain }, want: "d"},
	{env: "NETWORK", value: "net", get: func(c *Config) any { return c.Network }, want: "net"},
	{env: "NODE_NAME", value: "n2", get: func(c *Config) any { return c.NodeName }, want: "n2"},
	{env: "NODE_NAME", value: "", err: "selects this node's workloads"},
	{env: "NODE_NAME", value: "", with: "PROXY_MODE=dedicated PROXY_WORKLOAD_INFO=a/b/c", get: func(c *Config) any { return c.NodeName }, want: ""},
	{env: "POD_NAME", value: "p", get: func(c *Config) any { return c.PodName }, want: "p"},
	{env: "POD_NAMESPACE", value: "p", get: func(c *Config) any { return c.PodNamespace }, want: "p"},
	{env: "SERVICE_ACCOUNT", value: "p", get: func(c *Config) any { return c.ServiceAccount }, want: "p"},
	{env: "INSTANCE_IP", value: "10.0.0.1", get: func(c *Config) any { return c.instanceIP() }, want: "10.0.0.1"},
	{env: "INSTANCE_IP", value: "", get: func(c *Config) any { return c.instanceIP() }, want: "1.1.1.1"},
	{env: "ENABLE_PROXY", value: "false", get: func(c *Config) any { return c.EnableProxy }, want: false},
	{env: "ENABLE_PROXY", value: "false", with: "ISTIO_META_DNS_CAPTURE=no", err: "nothing would be served"},
	{env: "UNSTABLE_ENABLE_SOCKS5", value: "true", get: func(c *Config) any { return c.SOCKS5 }, want: true},
	{env: "INPOD_UDS", value: "/s", get: func(c *Config) any { return c.InpodUDS }, want: "/s"},
	{env: "INPOD_UDS", value: "", err: "node agent's socket"},
	{env: "INPOD_PORT_REUSE", value: "false", get: func(c *Config) any { return c.InpodPortReuse }, want: false},
	{env: "PACKET_MARK", value: "1338", get: func(c *Config) any { return c.PacketMark }, want: uint64(1338)},
	{env: "PACKET_MARK", value: "0x539", get: func(c *Config) any { return c.PacketMark }, want: uint64(0x539)},
	{env: "ENABLE_ORIG_SRC", value: "true", get: func(c *Config) any { return fmt.Sprint(string(c.OrigSrc)+" ", c.EnableOrigSrc) }, want: "true true"},
	{env: "ENABLE_ORIG_SRC", value: "0", get: func(c *Config) any { return fmt.Sprint(string(c.OrigSrc)+" ", c.EnableOrigSrc) }, want: "false false"},
	{env: "ENABLE_ORIG_SRC", value: "", get: func(c *Config) any { return fmt.Sprint(string(c.OrigSrc)+" ", c.EnableOrigSrc) }, want: "auto true"},
	{env: "ENABLE_ORIG_SRC", value: "maybe", err: "true, false or auto"},
	{env: "IPV6_ENABLED", value: "false", get: func(c *Config) any { return c.IPv6Enabled }, want: false},
	{env: "LOCALHOST_APP_TUNNEL", value: "false", get: func(c *Config) any { return c.LocalhostAppTunnel }, want: false},
	{env: "ENABLE_RESPONSE_BAGGAGE", value: "false", get: func(c *Config) any { return c.ResponseBaggage }, want: false},
	{env: "ISTIO_META_DNS_CAPTURE", value: "TRUE", get: func(c *Config) any { return c.DNSCapture }, want: true},
	{env: "ISTIO_META_DNS_CAPTURE", value: "1", get: func(c *Config) any { return c.DNSCapture }, want: false},
	{env: "ISTIO_META_DNS_PROXY_ADDR", value: "127.0.0.1:5353", get: func(c *Config) any { return c.DNSProxyAddr }, want: "127.0.0.1:5353"},
	{env: "PREFERED_SERVICE_NAMESPACE", value: "ns", get: func(c *Config) any { return c.PreferredServiceNamespace }, want: "ns"},
	{env: "TLS_RECORDS", value: "go", get: func(c *Config) any { return c.TLSRecords }, want: "go"},
	{env: "TLS_RECORDS", value: "rust", err: "want go or ambit"},
	{env: "TLS12_ENABLED", value: "true", get: func(c *Config) any { return c.TLS12 }, want: true},
	{env: "COMPLIANCE_POLICY", value: "pqc", get: func(c *Config) any { return c.CompliancePolicy }, want: "pqc"},
	{env: "COMPLIANCE_POLICY", value: "pqc", with: "TLS12_ENABLED=true", warn: "no effect with COMPLIANCE_POLICY=pqc"},
	{env: "COMPLIANCE_POLICY", value: "fips", err: "want pqc or nothing"},
	{env: "HTTP2_STREAM_WINDOW_SIZE", value: "65535", get: func(c *Config) any { return c.StreamWindow }, want: 65535},
	{env: "HTTP2_STREAM_WINDOW_SIZE", value: "65534", err: "not between 65535 and"},
	{env: "HTTP2_CONNECTION_WINDOW_SIZE", value: "33554432", get: func(c *Config) any { return c.ConnectionWindow }, want: 32 << 20},
	{env: "HTTP2_CONNECTION_WINDOW_SIZE", value: "1048576", warn: "smaller than HTTP2_STREAM_WINDOW_SIZE"},
	{env: "HTTP2_CONNECTION_WINDOW_SIZE", value: "2147483648", err: "not between 65535 and"},
	{env: "HTTP2_FRAME_SIZE", value: "16384", get: func(c *Config) any { return c.FrameSize }, want: 16384},
	{env: "HTTP2_FRAME_SIZE", value: "16777216", err: "not between 16384 and 16777215"},
	{env: "POOL_MAX_STREAMS_PER_CONNECTION", value: "7", get: func(c *Config) any { return c.PoolMaxStreams }, want: 7},
	{env: "POOL_MAX_STREAMS_PER_CONNECTION", value: "0", err: "not positive"},
	{env: "POOL_UNUSED_RELEASE_TIMEOUT", value: "1m", get: func(c *Config) any { return c.PoolIdle }, want: time.Minute},
	{env: "CONNECTION_TERMINATION_DEADLINE", value: "3s", with: "TERMINATION_GRACE_PERIOD_SECONDS=30", get: func(c *Config) any { return c.TerminationDeadline }, want: 3 * time.Second},
	{env: "CONNECTION_TERMINATION_DEADLINE", value: "1m", warn: "--unenrol-drain=1m0s or more"},
	{env: "TERMINATION_GRACE_PERIOD_SECONDS", value: "30", get: func(c *Config) any { return c.TerminationDeadline }, want: 25 * time.Second},
	{env: "TERMINATION_GRACE_PERIOD_SECONDS", value: "10", get: func(c *Config) any { return c.TerminationDeadline }, want: 9 * time.Second},
	{env: "TERMINATION_GRACE_PERIOD_SECONDS", value: "1", get: func(c *Config) any { return c.TerminationDeadline }, want: time.Second},
	{env: "KEEPALIVE_ENABLED", value: "false", get: func(c *Config) any { return c.KeepaliveEnabled }, want: false},
	{env: "KEEPALIVE_TIME", value: "10s", get: func(c *Config) any { return c.KeepaliveTime }, want: 10 * time.Second},
	{env: "KEEPALIVE_INTERVAL", value: "3m", get: func(c *Config) any { return c.KeepaliveInterval }, want: 3 * time.Minute},
	{env: "KEEPALIVE_INTERVAL", value: "0", err: "must be positive"},
	{env: "KEEPALIVE_RETRIES", value: "3", get: func(c *Config) any { return c.KeepaliveRetries }, want: 3},
	{env: "USER_TIMEOUT_ENABLED", value: "true", get: func(c *Config) any { return c.UserTimeout }, want: true},
	{env: "ZTUNNEL_WORKER_THREADS", value: "3", get: func(c *Config) any { return c.Workers }, want: 3},
	{env: "ZTUNNEL_WORKER_THREADS", value: "3", with: "GOMAXPROCS=1", get: func(c *Config) any { return c.Workers }, want: 0},
	{env: "ZTUNNEL_WORKER_THREADS", value: "many", err: "a share such as 25%"},
	{env: "ZTUNNEL_ADAPTIVE_THREADS", value: "true", get: func(c *Config) any { return c.Adaptive }, want: true},
	{env: "ZTUNNEL_ADAPTIVE_THREADS", value: "false", get: func(c *Config) any { return c.Adaptive }, want: false},
	{env: "ZTUNNEL_WORKER_THREADS", value: "2", get: func(c *Config) any { return c.Adaptive }, want: false},
	{env: "ZTUNNEL_WORKER_THREADS", value: "auto", get: func(c *Config) any { return c.Adaptive }, want: true},
	{env: "GOMAXPROCS", value: "2", get: func(c *Config) any { return c.Adaptive }, want: false},
	{env: "ZTUNNEL_CPU_LIMIT", value: "16", with: "ZTUNNEL_WORKER_THREADS=25%", get: func(c *Config) any { return c.Workers }, want: 4},
	{env: "ZTUNNEL_RESOURCE_CPU_LIMIT", value: "500m", get: func(c *Config) any { return c.Workers }, want: 1},
	{env: "ZTUNNEL_RESOURCE_CPU_REQUEST", value: "x", err: "want processors"},
	{env: "LOG_FORMAT", value: "json", get: func(c *Config) any { return c.LogFormat }, want: "json"},
	{env: "LOG_FORMAT", value: "xml", err: "log format"},
	{env: "LOG_LEVEL", value: "warn", with: "RUST_LOG=debug", get: func(c *Config) any { return c.LogLevel }, want: "warn"},
	{env: "LOG_LEVEL", value: "loud", err: "LOG_LEVEL"},
	{env: "RUST_LOG", value: "info,ztunnel::xds::client=debug,access=off", get: func(c *Config) any { return c.LogLevel }, want: "info,xds=debug,access=off"},
	{env: "RUST_LOG", value: "h2=trace", warn: "no such target here"},
	{env: "AUTHZ_POLICY_INFO_LOGGING", value: "true", get: func(c *Config) any { return c.PolicyInfoLogging }, want: true},
	{env: "ADMIN_ADDR", value: "localhost:1", get: func(c *Config) any { return c.AdminAddr }, want: "localhost:1"},
	{env: "STATS_ADDR", value: ":1", get: func(c *Config) any { return c.StatsAddr }, want: ":1"},
	{env: "READINESS_ADDR", value: ":1", get: func(c *Config) any { return c.ReadinessAddr }, want: ":1"},
	{env: "XDS_HEADER_X", value: "1", get: func(c *Config) any { return c.XDSHeaders["x"] }, want: "1"},
	{env: "CA_HEADER_X", value: "1", get: func(c *Config) any { return c.CAHeaders["x"] }, want: "1"},
	{env: "ISTIO_META_FOO", value: "bar", get: func(c *Config) any { return c.Metadata["FOO"] }, want: "bar"},
	{env: "ISTIO_METAJSON_FOO", value: `{"a":[1]}`, get: func(c *Config) any { return fmt.Sprint(c.Metadata["FOO"]) }, want: "map[a:[1]]"},
	{env: "ISTIO_METAJSON_FOO", value: `{`, err: "want JSON"},
}

func TestEveryVariable(t *testing.T) {
	for _, tt := range variables {
		t.Run(tt.env+"="+tt.value, func(t *testing.T) {
			env := append([]string{"KUBERNETES_SERVICE_HOST=10.96.0.1"}, minimal...)
			env = append(append(env, strings.Fields(tt.with)...), tt.env+"="+tt.value)
			c, err := Parse(nil, env, io.Discard)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("got %v, want an error with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if tt.get != nil && tt.get(&c) != tt.want {
				t.Errorf("got %v, want %v", tt.get(&c), tt.want)
			}
			if said := strings.Join(c.Warnings, "\n"); tt.warn != "" && !strings.Contains(said, tt.warn) {
				t.Errorf("warnings %q, want %q", said, tt.warn)
			}
			flagged := flagName(tt.env)
			for _, s := range c.settings() {
				if flagName(s.env) != flagged {
					continue
				}
				env = append(env[:len(env)-1:len(env)-1], tt.env+"=\x00") // a flag wins over whatever is there
				f, err := Parse([]string{"--" + flagged + "=" + tt.value}, env, io.Discard)
				if err != nil || tt.get != nil && tt.get(&f) != tt.want {
					t.Errorf("as a flag: %+v, %v", f.Warnings, err)
				}
			}
		})
	}
	var c Config
	for _, s := range c.settings() {
		found := false
		for _, tt := range variables {
			found = found || tt.env == s.env
		}
		if !found {
			t.Errorf("no row for %s", s.env)
		}
	}
}

func TestMeshFileLosesToAllElse(t *testing.T) {
	t.Chdir(t.TempDir())
	write := func(s string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(meshFile), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(meshFile, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("trustDomain: x\ndefaultConfig:\n  discoveryAddress: file:1\n  proxyAdminPort: 7\n  concurrency: 5\n  proxyMetadata: {A: file, B: file}\n")
	c, err := Parse([]string{"--node-name=n"}, []string{"PROXY_CONFIG={proxyAdminPort: 8, proxyMetadata: {A: text}}", "ZTUNNEL_WORKER_THREADS=6"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(c.XDSAddress, " ", c.AdminAddr, " ", c.Workers, " ", c.Metadata); got != "file:1 localhost:8 6 map[A:text B:file]" {
		t.Error(got)
	}
	write("defaultConfig: [")
	if _, err := Parse([]string{"--node-name=n"}, nil, io.Discard); err == nil || !strings.Contains(err.Error(), meshFile) {
		t.Errorf("a broken mesh file: %v", err)
	}
}

func TestDefaultsOutsideOfKubernetes(t *testing.T) {
	c, err := Parse(nil, []string{"NODE_NAME=n"}, io.Discard)
	if err != nil || c.XDSAddress != "localhost:15012" || len(c.Warnings) > 0 {
		t.Errorf("%q %q %v", c.XDSAddress, c.Warnings, err)
	}
}

func TestWorkers(t *testing.T) {
	for _, tt := range []struct {
		t    threads
		want int
	}{
		{threads{}, 12}, {threads{workerThreads: "auto", request: "20"}, 20}, {threads{limit: "1500m"}, 2}, {threads{cpus: 4}, 2},
		{threads{cpus: 1}, 1}, {threads{limit: "100"}, 48}, {threads{workerThreads: "0"}, 48}, {threads{workerThreads: "0", count: "3"}, 3},
		{threads{workerThreads: "50%"}, 24}, {threads{workerThreads: "1%", count: "2"}, 1}, {threads{workerThreads: "9"}, 9},
		{threads{request: "200m"}, 12},
	} {
		if tt.t.cpus == 0 {
			tt.t.cpus = 48
		}
		if got, err := tt.t.workers(); err != nil || got != tt.want {
			t.Errorf("%+v: %d, %v, want %d", tt.t, got, err, tt.want)
		}
	}
	for _, bad := range []threads{{workerThreads: "0%"}, {workerThreads: "101%"}, {workerThreads: "-1"}, {workerThreads: "NaN%"}, {limit: "lots"}, {count: "-1"}, {request: "1e99"}} {
		if n, err := bad.workers(); err == nil {
			t.Errorf("%+v was taken for %d", bad, n)
		}
	}
}

func TestRustLog(t *testing.T) {
	for _, tt := range []struct{ spec, want, unknown string }{
		{"", "info", "[]"}, {"debug", "debug", "[]"}, {"ztunnel=debug", "debug", "[]"}, {"warn,ztunnel::proxy::inbound=trace", "warn,access=trace", "[]"},
		{"ztunnel::xds", "xds=trace", "[]"}, {"h2=off,hyper=info", "info", "[h2 hyper]"}, {"info/needle", "info", "[/needle]"},
		{"ztunnel::identity::manager=off", "cert=off", "[]"}, {"ztunnel::dns=debug,dns=info", "dns=debug,dns=info", "[]"},
	} {
		got, unknown := rustLog(tt.spec)
		if got != tt.want || fmt.Sprint(unknown) != tt.unknown {
			t.Errorf("%q: %q %v, want %q %s", tt.spec, got, unknown, tt.want, tt.unknown)
		}
	}
}

// The agent's rules must outlive the proxy's drain: the defaults agree.
func TestDrainFitsTheAgents(t *testing.T) {
	c, err := Parse(nil, minimal, io.Discard)
	if err != nil || c.TerminationDeadline != handoff.DrainTime || len(c.Warnings) > 0 {
		t.Errorf("%v %q %v", c.TerminationDeadline, c.Warnings, err)
	}
}

func TestConfigRefusesAllMistakesAtOnce(t *testing.T) {
	_, err := Parse([]string{"--log-level", "loud", "extra"}, []string{"XDS_ADDRESS=http://x:1", "CA_ADDRESS=nowhere", "SECRET_TTL=soon"}, io.Discard)
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"NODE_NAME", "XDS_ADDRESS", "scheme must be https", "CA_ADDRESS", "SECRET_TTL", "LOG_LEVEL", "unexpected arguments"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error does not name %s: %v", want, err)
		}
	}
}

func TestHelpIsAlignedAndKeepsTheToken(t *testing.T) {
	for _, args := range [][]string{{"help"}, {"--help"}, {"proxy", "-h"}, {"--no-such-flag"}, {"--auth-token"}} {
		var out strings.Builder
		_, err := Parse(args, append(minimal, "AUTH_TOKEN=head.secret.tail"), &out)
		if err == nil || strings.Contains(out.String()+err.Error(), "head.secret") {
			t.Errorf("%s: %v, usage: %s", args, err, out.String())
		}
		if args[0][:2] == "--" && args[0] != "--help" {
			continue
		}
		column := -1
		for line := range strings.Lines(out.String()) {
			if strings.HasPrefix(line, "FLAG") {
				column = strings.Index(line, "MEANING")
			} else if strings.HasPrefix(line, "--") && (column < 0 || line[column-1] != ' ' || line[column] == ' ') {
				t.Errorf("not aligned: %s", line)
			}
		}
		for _, want := range []string{"--auth-token ", " 16777216 ", " 5m0s ", "XDS_HEADER_*"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s: help lacks %q:\n%s", args, want, out.String())
			}
		}
	}
}

func TestTokenIsAFileOrAJWT(t *testing.T) {
	if tok, err := (&Config{AuthToken: "a.b.c"}).token(); err != nil || tok != "a.b.c" {
		t.Errorf("literal: %q, %v", tok, err)
	}
	if tok, err := (&Config{AuthToken: "./var/run/secrets/tokens/none"}).token(); err == nil {
		t.Errorf("a path that does not exist was taken for a token: %q", tok)
	}
}
