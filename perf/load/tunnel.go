package load

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// X25519 is the key exchange of Spec.Group without a post-quantum part.
const X25519 = "x25519"

// Client is who makes handshakes: what proxies have, given to a load. It is for a
// lab's certificates, which end with the lab.
type Client struct {
	Chain [][]byte `json:"chain"` // DER, the leaf first
	Key   []byte   `json:"key"`   // PKCS #8
	Roots [][]byte `json:"roots"`
	Name  string   `json:"name,omitempty"` // expected of the server; "": any that the roots vouch for
	To    string   `json:"to"`             // the server of tunnels behind the proxy; "": it relays without being asked
}

// config verifies as a node proxy does. No session is resumed.
func (c *Client) config(group string) (*tls.Config, error) {
	key, err := x509.ParsePKCS8PrivateKey(c.Key)
	if err != nil {
		return nil, fmt.Errorf("read key of client: %w", err)
	}
	roots := x509.NewCertPool()
	for _, der := range c.Roots {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("read root of client: %w", err)
		}
		roots.AddCert(root)
	}
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: c.Chain, PrivateKey: key}}, RootCAs: roots, ServerName: c.Name,
		SessionTicketsDisabled: true,
	}
	if c.To != "" {
		cfg.NextProtos = []string{http2.NextProtoTLS}
	}
	if group == X25519 {
		cfg.CurvePreferences = []tls.CurveID{tls.X25519}
	}
	if c.Name == "" {
		cfg.InsecureSkipVerify = true // names of hosts only; the chain is verified below
		cfg.VerifyConnection = func(s tls.ConnectionState) error {
			inter := x509.NewCertPool()
			for _, cert := range s.PeerCertificates[1:] {
				inter.AddCert(cert)
			}
			_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: inter})
			return err
		}
	}
	return cfg, nil
}

// secure connects and completes the handshake.
func (r *run) secure(cfg *tls.Config) (*tls.Conn, func(), error) {
	raw, err := r.dial(nil)
	if err != nil {
		return nil, nil, err
	}
	c := tls.Client(raw, cfg)
	if err := c.HandshakeContext(context.WithoutCancel(r.ctx)); err != nil { // the end of a load ends raw
		r.close(raw)
		return nil, nil, fmt.Errorf("handshake: %w", err)
	}
	s := c.ConnectionState()
	r.mu.Lock()
	r.agreed = Agreed{Suite: tls.CipherSuiteName(s.CipherSuite), Group: s.CurveID.String()}.String()
	r.mu.Unlock()
	return c, func() { r.close(raw) }, nil
}

// handshake completes mutual TLS and one byte of the server's: only that tells that
// it took the client's certificate (RFC 8446 appendix E.1.2 leaves it open until then).
func (r *run) handshake(w *worker, _ int) error {
	cfg, err := r.Client.config(r.Group)
	if err != nil {
		return err
	}
	var b [1]byte
	for !r.ended.Load() {
		began := monotonic()
		c, end, err := r.secure(cfg)
		if err != nil {
			return err
		}
		if err = r.hail(c); err == nil {
			_, err = io.ReadFull(c, b[:])
		}
		end()
		if err != nil {
			return fmt.Errorf("read after the handshake: %w", err)
		}
		r.done(w, monotonic()-began, true)
	}
	return nil
}

// hail makes a server say something: HTTP/2 begins with both sides' settings.
func (r *run) hail(c io.Writer) error {
	if r.Client.To == "" {
		_, err := c.Write(open(verbAnswer, max(r.Size, headerSize)))
		return err
	}
	b := bytes.NewBufferString(http2.ClientPreface)
	if err := http2.NewFramer(b, nil).WriteSettings(); err != nil {
		return err
	}
	_, err := c.Write(b.Bytes())
	return err
}

// tunnel makes a tunnel, a request and a response through it, and closes it: what a
// first connection between two identities costs the proxy at its far end.
func (r *run) tunnel(w *worker, _ int) error {
	cfg, err := r.Client.config(r.Group)
	if err != nil {
		return err
	}
	request, answer := open(verbAnswer, r.Size), make([]byte, r.Size)
	for !r.ended.Load() {
		began := monotonic()
		c, end, err := r.secure(cfg)
		if err != nil {
			return err
		}
		if r.Client.To == "" {
			if _, err = c.Write(request); err == nil {
				_, err = io.ReadFull(c, answer)
			}
		} else {
			err = throughCONNECT(c, r.Client.To, request)
		}
		end()
		if err != nil {
			return fmt.Errorf("request through a tunnel: %w", err)
		}
		r.done(w, monotonic()-began, true)
	}
	return nil
}

// throughCONNECT sends a request on a stream to an address (RFC 9113 §8.5) and reads
// as much in answer. Requests are smaller than any window.
func throughCONNECT(c io.ReadWriter, to string, request []byte) error {
	var out, block bytes.Buffer
	out.WriteString(http2.ClientPreface)
	enc := hpack.NewEncoder(&block)
	for _, f := range []hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: to}} {
		if err := enc.WriteField(f); err != nil {
			return err
		}
	}
	f := http2.NewFramer(&out, c)
	err := errors.Join(f.WriteSettings(), f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true}),
		f.WriteData(1, false, request))
	if err != nil {
		return err
	}
	if _, err := c.Write(out.Bytes()); err != nil {
		return err
	}
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	for got := 0; got < len(request); {
		frame, err := f.ReadFrame()
		if err != nil {
			return err
		}
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			if s := frame.PseudoValue("status"); s != "200" {
				return fmt.Errorf("CONNECT to %s answered with %s", to, s)
			}
		case *http2.DataFrame:
			got += len(frame.Data())
		case *http2.RSTStreamFrame:
			return fmt.Errorf("CONNECT to %s reset: %s", to, frame.ErrCode)
		case *http2.GoAwayFrame:
			return fmt.Errorf("tunnel to %s ended: %s", to, frame.ErrCode)
		}
	}
	return nil
}
