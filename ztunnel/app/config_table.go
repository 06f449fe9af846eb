package app

import (
	"flag"
	"strconv"
	"time"
)

// setting is one variable.
type setting struct {
	env, help string
	value     flag.Value
	aliases   []string // further names in the environment
	secret    bool     // its value is never shown
}

func (s setting) shown(v string) string {
	if s.secret {
		return "..."
	}
	return v
}

// settings is the table of all variables but the families (XDS_HEADER_*,
// CA_HEADER_*, ISTIO_META_*, ISTIO_METAJSON_*), in the order of `ztunnel help`.
func (c *Config) settings() []setting {
	str := func(p *string) flag.Value { return stringValue{p} }
	boolean := func(p *bool) flag.Value { return parsed[bool]{p, strconv.ParseBool} }
	number := func(p *int) flag.Value { return parsed[int]{p, strconv.Atoi} }
	duration := func(p *time.Duration) flag.Value { return parsed[time.Duration]{p, parseDuration} }
	return []setting{
		{env: "XDS_ADDRESS", help: "control plane, host:port; empty for none", value: str(&c.XDSAddress)},
		{env: "CA_ADDRESS", help: "certificate authority, host:port; XDS_ADDRESS if not set", value: str(&c.CAAddress)},
		{env: "XDS_ROOT_CA", help: "roots of the control plane: a file, PEM text, or SYSTEM", value: str(&c.XDSRootCA)},
		{env: "CA_ROOT_CA", help: "roots of the certificate authority's server: a file, PEM text, or SYSTEM", value: str(&c.CARootCA)},
		{env: "ALT_XDS_HOSTNAME", help: "name expected in the control plane's certificate", value: str(&c.AltXDSHostname)},
		{env: "ALT_CA_HOSTNAME", help: "name expected in the authority's certificate", value: str(&c.AltCAHostname)},
		{env: "AUTH_TOKEN", help: "this node's token: a file or the token", value: str(&c.AuthToken), secret: true},
		{env: "XDS_ON_DEMAND", help: "ask the control plane only for what connections need", value: boolean(&c.OnDemand)},
		{env: "LOCAL_XDS_PATH", help: "file that describes the mesh, besides or instead of the control plane", value: str(&c.LocalXDSPath)},
		{env: "LOCAL_XDS", help: "the text of such a file", value: str(&c.LocalXDS)},
		{env: "SECRET_TTL", help: "lifetime asked for certificates", value: duration(&c.SecretTTL)},
		{env: "CRL_PATH", help: "file of certificate revocation lists, PEM or DER", value: str(&c.CRLPath)},
		{env: "FAKE_CA", help: "refused: sign one's own certificates", value: boolean(&c.fakeCA)},
		{env: "TRUST_DOMAIN", help: "trust domain", value: str(&c.TrustDomain)},
		{env: "TRUST_DOMAIN_ALIASES", help: "further trust domains accepted from clients, comma-separated", value: str(&c.TrustDomainAliases)},

		{env: "PROXY_MODE", help: "shared (the pods of a node) or dedicated (one workload, in this network namespace)", value: str(&c.Mode)},
		{env: "PROXY_WORKLOAD_INFO", help: "whom a dedicated proxy serves: namespace/name/serviceaccount", value: parsed[WorkloadRef]{&c.Workload, parseWorkloadRef}},
		{env: "PROXY_CONFIG", help: "settings as YAML: discoveryAddress, proxyAdminPort, statusPort, concurrency, proxyMetadata", value: ignored{}},
		{env: "CLUSTER_ID", help: "cluster of this node", value: str(&c.ClusterID), aliases: []string{"ISTIO_META_CLUSTER_ID"}},
		{env: "CLUSTER_DOMAIN", help: "DNS domain of the cluster", value: str(&c.ClusterDomain)},
		{env: "NETWORK", help: "network of this node", value: str(&c.Network)},
		{env: "NODE_NAME", help: "name of this node", value: str(&c.NodeName)},
		{env: "POD_NAME", help: "name of the pod of this process", value: str(&c.PodName)},
		{env: "POD_NAMESPACE", help: "namespace of the pod of this process", value: str(&c.PodNamespace)},
		{env: "SERVICE_ACCOUNT", help: "service account of this process", value: str(&c.ServiceAccount)},
		{env: "INSTANCE_IP", help: "address of the pod of this process", value: str(&c.InstanceIP)},

		{env: "ENABLE_PROXY", help: "serve connections (false: only DNS)", value: boolean(&c.EnableProxy)},
		{env: "UNSTABLE_ENABLE_SOCKS5", help: "take connections by SOCKS5 on 127.0.0.1:15080 too", value: boolean(&c.SOCKS5)},
		{env: "INPOD_UDS", help: "socket of the node agent", value: str(&c.InpodUDS)},
		{env: "INPOD_PORT_REUSE", help: "let the next proxy listen while this one drains", value: boolean(&c.InpodPortReuse)},
		{env: "PACKET_MARK", help: "mark of the proxy's sockets in pods", value: parsed[uint64]{&c.PacketMark, func(s string) (uint64, error) { return strconv.ParseUint(s, 0, 32) }}},
		{env: "ENABLE_ORIG_SRC", help: "show applications their clients' addresses: true, false, or auto", value: parsed[OrigSrc]{&c.OrigSrc, parseOrigSrc}},
		{env: "IPV6_ENABLED", help: "listen for IPv6 in pods, and answer DNS with it", value: boolean(&c.IPv6Enabled)},
		{env: "LOCALHOST_APP_TUNNEL", help: "reach an application's PROXY protocol port over loopback", value: boolean(&c.LocalhostAppTunnel)},
		{env: "ENABLE_RESPONSE_BAGGAGE", help: "describe the destination in answers to CONNECT", value: boolean(&c.ResponseBaggage)},
		{env: "ISTIO_META_DNS_CAPTURE", help: "answer the pods' DNS", value: parsed[bool]{&c.DNSCapture, parseCapture}},
		{env: "ISTIO_META_DNS_PROXY_ADDR", help: "where the DNS proxy listens; port 15053 of loopback if empty", value: str(&c.DNSProxyAddr)},
		{env: "PREFERED_SERVICE_NAMESPACE", help: "namespace whose services win among those of one host name", value: str(&c.PreferredServiceNamespace)},

		{env: "TLS_RECORDS", help: "who protects TLS records after the handshake: ambit (many per system call) or go (crypto/tls; chosen by itself in FIPS mode)", value: str(&c.TLSRecords)},
		{env: "TLS12_ENABLED", help: "take and offer TLS 1.2 too", value: boolean(&c.TLS12)},
		{env: "COMPLIANCE_POLICY", help: "pqc: only key exchange that a quantum computer does not break (X25519MLKEM768)", value: str(&c.CompliancePolicy)},

		{env: "HTTP2_STREAM_WINDOW_SIZE", help: "largest window of a stream, bytes", value: number(&c.StreamWindow)},
		{env: "HTTP2_CONNECTION_WINDOW_SIZE", help: "window of a tunnel, bytes", value: number(&c.ConnectionWindow)},
		{env: "HTTP2_FRAME_SIZE", help: "largest frame accepted, bytes", value: number(&c.FrameSize)},
		{env: "POOL_MAX_STREAMS_PER_CONNECTION", help: "streams per tunnel", value: number(&c.PoolMaxStreams)},
		{env: "POOL_UNUSED_RELEASE_TIMEOUT", help: "idle time after which a tunnel is closed", value: duration(&c.PoolIdle)},
		{env: "CONNECTION_TERMINATION_DEADLINE", help: "time connections get at the end", value: duration(&c.TerminationDeadline)},
		{env: "TERMINATION_GRACE_PERIOD_SECONDS", help: "time this process gets at the end, from which that is computed", value: number(&c.grace)},
		{env: "KEEPALIVE_ENABLED", help: "TCP keepalive on connections", value: boolean(&c.KeepaliveEnabled)},
		{env: "KEEPALIVE_TIME", help: "silence before the first probe", value: duration(&c.KeepaliveTime)},
		{env: "KEEPALIVE_INTERVAL", help: "time between probes", value: duration(&c.KeepaliveInterval)},
		{env: "KEEPALIVE_RETRIES", help: "unanswered probes that end a connection", value: number(&c.KeepaliveRetries)},
		{env: "USER_TIMEOUT_ENABLED", help: "TCP_USER_TIMEOUT of as long as keepalive takes to give up", value: boolean(&c.UserTimeout)},

		{env: "ZTUNNEL_WORKER_THREADS", help: "processors to use: a number, a share (25%), 0 for all, or auto", value: str(&c.threads.workerThreads)},
		{env: "ZTUNNEL_ADAPTIVE_THREADS", help: "with auto: use one processor, and more while there is work for them", value: boolean(&c.Adaptive)},
		{env: "ZTUNNEL_CPU_LIMIT", help: "processors there are, for a share of them", value: str(&c.threads.count)},
		{env: "ZTUNNEL_RESOURCE_CPU_LIMIT", help: "the container's CPU limit, for auto", value: str(&c.threads.limit)},
		{env: "ZTUNNEL_RESOURCE_CPU_REQUEST", help: "the container's CPU request, for auto", value: str(&c.threads.request)},
		{env: "LOG_FORMAT", help: "text (or plain) or json", value: str(&c.LogFormat)},
		{env: "LOG_LEVEL", help: "level, or level,scope=level,...", value: str(&c.LogLevel)},
		{env: "RUST_LOG", help: "the same with the reference's target names, if LOG_LEVEL is not set", value: str(&c.log.rust)},
		{env: "AUTHZ_POLICY_INFO_LOGGING", help: "log at level info which policy decided on a connection", value: boolean(&c.PolicyInfoLogging)},
		{env: "ADMIN_ADDR", help: "address of the admin port", value: str(&c.AdminAddr)},
		{env: "STATS_ADDR", help: "address of the metrics port", value: str(&c.StatsAddr)},
		{env: "READINESS_ADDR", help: "address of the readiness port", value: str(&c.ReadinessAddr)},
	}
}
