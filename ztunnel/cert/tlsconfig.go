package cert

import (
	"crypto/tls"
	"crypto/x509"
	"slices"
	"strings"
	"sync"

	"github.com/ambit-mesh/ambit/xds/identity"
)

// maxCachedConfigs bounds the cache of client configurations, one per (local
// identity, expected peers). Beyond it the cache starts over: a configuration
// costs a microsecond, the bound only guards memory.
const maxCachedConfigs = 8192

// curves: the post-quantum hybrid first, so that what is recorded today is not read
// by a quantum computer of tomorrow. Clients send shares of both it and X25519:
// a peer without the hybrid answers at once with the other. (crypto/tls orders
// them so whatever order they have here; GODEBUG=tlsmlkem=0 leaves the hybrid out,
// and FIPS 140 mode what is not approved.)
var curves = []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256, tls.CurveP384}

// configCache holds ready tls.Configs. Certificates, roots and time are looked
// up at handshake time, so a cached configuration never goes stale.
type configCache struct {
	mu     sync.RWMutex
	client map[configKey]*tls.Config
	server map[identity.ID]*tls.Config
}

type configKey struct {
	local identity.ID
	peers string
}

// suites12 are the reference's for TLS 1.2: forward secrecy and AES-GCM.
var suites12 = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
}

// base is what both roles share: TLS 1.3 with exactly h2. TLS 1.3 suites are
// not configurable in crypto/tls; with AES instructions on both ends it picks
// AES-GCM, and ztunnel peers offer nothing else.
func (c *Config) base() *tls.Config {
	cfg := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		MaxVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		CurvePreferences:       curves,
		SessionTicketsDisabled: true,
		// Whole 16 KiB records from the first byte: bulk is the rule here,
		// and small records cost both ends a syscall each.
		DynamicRecordSizingDisabled: true,
	}
	switch {
	case c.PostQuantum:
		cfg.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768}
	case c.TLS12:
		cfg.MinVersion, cfg.CipherSuites = tls.VersionTLS12, suites12
	}
	return cfg
}

// ClientConfig is how local dials a peer that must be one of expected. The
// handshake waits, within its context, for local's certificate.
func (m *Manager) ClientConfig(local identity.ID, expected []identity.ID) *tls.Config {
	k := configKey{local: local, peers: JoinPeers(expected)}
	m.configs.mu.RLock()
	cfg := m.configs.client[k]
	m.configs.mu.RUnlock()
	if cfg != nil {
		return cfg
	}
	accept := m.oneOf(local, slices.Clone(expected))
	cfg = m.cfg.base()
	// The peer has no DNS name: VerifyConnection judges its identity instead.
	// Without a ServerName no SNI is sent, so nothing names the peer in clear.
	cfg.InsecureSkipVerify = true
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		_, err := m.trust.Verify(cs, x509.ExtKeyUsageServerAuth, m.cfg.Now(), accept)
		m.countRevoked(Source, err)
		return err
	}
	cfg.GetClientCertificate = func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		c, err := m.Get(info.Context(), local)
		if err != nil {
			return nil, err
		}
		return &c.TLS, nil
	}
	m.configs.mu.Lock()
	defer m.configs.mu.Unlock()
	if m.configs.client == nil || len(m.configs.client) >= maxCachedConfigs {
		m.configs.client = map[configKey]*tls.Config{}
	}
	m.configs.client[k] = cfg
	return cfg
}

// ServerConfig is how local is served: every client shows a certificate of
// local's trust domain or of one of its aliases.
func (m *Manager) ServerConfig(local identity.ID) *tls.Config {
	m.configs.mu.RLock()
	cfg := m.configs.server[local]
	m.configs.mu.RUnlock()
	if cfg != nil {
		return cfg
	}
	accept := func(peer identity.ID) error { return inDomains(m.domains(local.TrustDomain()))(peer) }
	cfg = m.cfg.base()
	cfg.ClientAuth = tls.RequireAnyClientCert
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		_, err := m.trust.Verify(cs, x509.ExtKeyUsageClientAuth, m.cfg.Now(), accept)
		m.countRevoked(Destination, err)
		return err
	}
	cfg.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		c, err := m.Get(hello.Context(), local)
		if err != nil {
			return nil, err
		}
		return &c.TLS, nil
	}
	m.configs.mu.Lock()
	defer m.configs.mu.Unlock()
	if m.configs.server == nil || len(m.configs.server) >= maxCachedConfigs {
		m.configs.server = map[identity.ID]*tls.Config{}
	}
	m.configs.server[local] = cfg
	return cfg
}

// drop forgets an identity's configurations together with its certificate.
func (c *configCache) drop(id identity.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.server, id)
	for k := range c.client {
		if k.local == id {
			delete(c.client, k)
		}
	}
}

// JoinPeers is the canonical form of a set of expected peers: sorted, without
// repetitions, joined by commas. Two orders of one set share a tunnel.
func JoinPeers(expected []identity.ID) string {
	if len(expected) == 1 {
		return expected[0].String()
	}
	return joinIDs(expected)
}

// SplitPeers is the inverse of JoinPeers.
func SplitPeers(joined string) ([]identity.ID, error) {
	if joined == "" {
		return nil, nil
	}
	var out []identity.ID
	for s := range strings.SplitSeq(joined, ",") {
		id, err := identity.Parse(s)
		if err != nil {
			return nil, err
		}
		out = append(out, id)
	}
	return out, nil
}

func joinIDs(ids []identity.ID) string {
	s := make([]string, len(ids))
	for i, id := range ids {
		s[i] = id.String()
	}
	slices.Sort(s)
	return strings.Join(slices.Compact(s), ",")
}
