package topo

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/perf/load"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
)

// member is who makes handshakes with the far proxy, and where.
type member struct {
	client *load.Client
	server string
	watch  []load.Process
}

// asMember completes a load that makes handshakes itself: it is what the near proxy
// would be, with a certificate for the client's identity.
func (l *Lab) asMember(ctx context.Context, p Path, s *load.Spec) error {
	m, ok := l.members[p.Mode]
	if !ok {
		var err error
		if m, err = l.enrol(ctx, p); err != nil {
			return fmt.Errorf("make a client for handshakes: %w", err)
		}
		l.members[p.Mode] = m
	}
	s.Client, s.Server, s.Watch = m.client, m.server, m.watch
	return nil
}

func (l *Lab) enrol(ctx context.Context, p Path) (m member, err error) {
	if p.TLSServer == "" {
		return m, fmt.Errorf("%s has no TLS", p.Mode)
	}
	if !p.Meshed {
		pair, err := load.NewPair()
		if err != nil {
			return m, err
		}
		hop := Path{}
		if err := l.addHop(ctx, &hop, p.Far, load.Hop{TLSIn: true, Pair: pair}); err != nil {
			return m, err
		}
		return member{pair.Client(), hop.Server, hop.Watch}, nil
	}
	var near load.Process
	for _, w := range p.Watch {
		switch {
		case w.Name == "ztunnel@"+p.Near:
			near = w
		case w.Proxy:
			m.watch = append(m.watch, w)
		}
	}
	out, err := l.do(ctx, "", "exec", p.Near, "--", l.Self, Member, strconv.Itoa(near.PID), p.Namespace)
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal([]byte(out), &m.client); err != nil {
		return m, fmt.Errorf("read certificate: %w", err)
	}
	m.client.To, m.server = p.Server, p.TLSServer
	return m, nil
}

// EnrolAs asks the certificate authority for what a node proxy would have for a
// service account of a namespace, in the proxy's name: its settings are those of
// the process. It is for a lab.
func EnrolAs(ctx context.Context, pid int, namespace string, out io.Writer) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return fmt.Errorf("read settings of process %d: %w", pid, err)
	}
	env := map[string]string{}
	for _, kv := range strings.Split(string(b), "\x00") {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	at, err := url.Parse(env["CA_ADDRESS"])
	if err != nil {
		return fmt.Errorf("read CA_ADDRESS: %w", err)
	}
	host, _, err := net.SplitHostPort(at.Host)
	if err != nil {
		return fmt.Errorf("read CA_ADDRESS: %w", err)
	}
	authority, err := cert.NewClient(cert.CAConfig{
		Target: at.Host, ClusterID: env["CLUSTER_ID"],
		TLS: func() (*tls.Config, error) {
			pem, err := os.ReadFile(env["CA_ROOT_CA"])
			if err != nil {
				return nil, err
			}
			pool := x509.NewCertPool()
			pool.AppendCertsFromPEM(pem)
			return &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: host, NextProtos: []string{"h2"}}, nil
		},
		Token: func() (string, error) {
			b, err := os.ReadFile(env["AUTH_TOKEN"])
			return strings.TrimSpace(string(b)), err
		},
	})
	if err != nil {
		return err
	}
	defer authority.Close()
	id, err := identity.Parse("spiffe://" + env["TRUST_DOMAIN"] + "/ns/" + namespace + "/sa/default")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	m := cert.New(cert.Config{Authority: authority, TTL: time.Hour})
	go func() { _ = m.Run(ctx) }() // until ctx ends, below
	c, err := m.Get(ctx, id)
	if err != nil {
		return err
	}
	key, err := x509.MarshalPKCS8PrivateKey(c.TLS.PrivateKey)
	if err != nil {
		return err
	}
	client := load.Client{Chain: c.TLS.Certificate, Key: key}
	for _, r := range c.Roots {
		client.Roots = append(client.Roots, r.Raw)
	}
	return json.NewEncoder(out).Encode(client)
}
