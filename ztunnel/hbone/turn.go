package hbone

import (
	"context"
	"crypto/tls"

	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

// turn is a handshake's right to compute. Signing and verifying cost more than all else that a connection asks of the
// node, and each goroutine that does so keeps relays waiting for a processor. So few do at a time, each pod's when it is
// that pod's turn, and a handshake that waits, for its peer or for a certificate, lets others.
//
// It belongs to the goroutine of one handshake.
type turn struct {
	ctx     context.Context // of the handshake
	account *ledger.Account
	held    bool
}

func (t *turn) take() error {
	if t.held {
		return nil
	}
	if err := t.account.Acquire(t.ctx, ledger.Turns, 1); err != nil {
		return err
	}
	t.held = true
	return nil
}

func (t *turn) give() {
	if t.held {
		t.held = false
		t.account.Release(ledger.Turns, 1)
	}
}

// without does what may wait. Its own error counts more than that there was no turn in time.
func (t *turn) without(wait func() error) error {
	t.give()
	if err := wait(); err != nil {
		return err
	}
	return t.take()
}

// during returns cfg with callbacks that may wait for a certificate outside of the turn.
func (t *turn) during(cfg *tls.Config) *tls.Config {
	if t.account == nil || cfg.GetCertificate == nil && cfg.GetClientCertificate == nil {
		return cfg
	}
	cfg = cfg.Clone()
	if get := cfg.GetCertificate; get != nil {
		cfg.GetCertificate = func(h *tls.ClientHelloInfo) (c *tls.Certificate, err error) {
			err = t.without(func() (err error) { c, err = get(h); return err })
			return c, err
		}
	}
	if get := cfg.GetClientCertificate; get != nil {
		cfg.GetClientCertificate = func(r *tls.CertificateRequestInfo) (c *tls.Certificate, err error) {
			err = t.without(func() (err error) { c, err = get(r); return err })
			return c, err
		}
	}
	return cfg
}
