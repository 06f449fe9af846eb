package record

import (
	"bytes"
	"crypto/fips140"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Secrets holds a connection's first application traffic secrets between its handshake and Takeover. It is the
// KeyLogWriter of that one connection, and nothing of it is ever written elsewhere.
type Secrets struct {
	next io.Writer // the configuration's own KeyLogWriter, if it has one

	mu             sync.Mutex
	client, server []byte // guarded by mu
}

// Capture returns a copy of cfg for one connection, and where its secrets will be.
func Capture(cfg *tls.Config) (*tls.Config, *Secrets) {
	s := &Secrets{next: cfg.KeyLogWriter}
	return s.attach(cfg), s
}

func (s *Secrets) attach(cfg *tls.Config) *tls.Config {
	cfg = cfg.Clone()
	cfg.KeyLogWriter = s
	cfg.SessionTicketsDisabled = true // a ticket would be a record of our sequence that we have not counted
	if choose := cfg.GetConfigForClient; choose != nil {
		cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			chosen, err := choose(hello)
			if chosen == nil || err != nil {
				return chosen, err
			}
			return s.attach(chosen), nil
		}
	}
	return cfg
}

// Write takes one line in the NSS key log format that crypto/tls writes: label, client random, secret.
func (s *Secrets) Write(line []byte) (int, error) {
	label, rest, _ := bytes.Cut(bytes.TrimSpace(line), []byte(" "))
	var dst *[]byte
	switch string(label) {
	case "CLIENT_TRAFFIC_SECRET_0":
		dst = &s.client
	case "SERVER_TRAFFIC_SECRET_0":
		dst = &s.server
	}
	if dst != nil {
		_, digits, _ := bytes.Cut(rest, []byte(" "))
		secret := make([]byte, hex.DecodedLen(len(digits)))
		if _, err := hex.Decode(secret, digits); err != nil {
			return 0, errors.New("record: unreadable traffic secret") // the cause would quote it
		}
		s.mu.Lock()
		clear(*dst)
		*dst = secret
		s.mu.Unlock()
	}
	if s.next != nil {
		return s.next.Write(line)
	}
	return len(line), nil
}

// Wipe forgets the secrets. Takeover does it, too.
func (s *Secrets) Wipe() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.client)
	clear(s.server)
	s.client, s.server = nil, nil
}

// Allowed reports whether this process may protect records outside crypto/tls: not in FIPS mode, whose module boundary
// takes nonces from crypto/tls only.
func Allowed() bool { return !fips140.Enabled() }

// Supported reports whether Takeover can continue the connection.
func Supported(cs *tls.ConnectionState) bool {
	_, ok := suites[cs.CipherSuite]
	return ok && cs.Version == tls.VersionTLS13 && cs.HandshakeComplete
}

// Takeover ends crypto/tls's part in a connection, as its client or server, and wipes s.
func Takeover(cs *tls.ConnectionState, s *Secrets, client bool) (*Opener, *Sealer, error) {
	defer s.Wipe()
	if !Supported(cs) {
		return nil, nil, fmt.Errorf("record: %s with %s is not ours", tls.VersionName(cs.Version), tls.CipherSuiteName(cs.CipherSuite))
	}
	suite := suites[cs.CipherSuite]
	s.mu.Lock()
	read, write := bytes.Clone(s.server), bytes.Clone(s.client)
	s.mu.Unlock()
	if !client {
		read, write = write, read
	}
	if n := suite.hash().Size(); len(read) != n || len(write) != n {
		return nil, nil, errors.New("record: handshake left no traffic secrets")
	}
	out := &Sealer{}
	in := &Opener{client: client, out: out}
	if err := out.keys.install(suite, write); err != nil {
		return nil, nil, err
	}
	if err := in.keys.install(suite, read); err != nil {
		return nil, nil, err
	}
	return in, out, nil
}
