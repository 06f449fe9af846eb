package flow

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/record"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// TestErrorsHaveReasons: by their types, on whichever side they are met.
func TestErrorsHaveReasons(t *testing.T) {
	relayed := func(err error) error { return &relay.Error{Side: "b", Op: "read", Err: err} }
	stream := func(err error) error { return relayed(&net.OpError{Op: "read", Net: "hbone", Err: err}) }
	socket := func(err error) error { return relayed(&net.OpError{Op: "read", Net: "tcp", Err: err}) }
	served := func(s hbone.Stage, err error) error { return &hbone.ServeError{Stage: s, Err: err} }
	for _, c := range []struct {
		name string
		err  error
		want Reason
		flag Flag
	}{
		{"nothing", nil, ReasonNone, FlagNone},
		{"policy", &DenyError{Reason: "r"}, ReasonPolicy, FlagDeny},
		{"policy, live", &DenyError{Reason: "r", Live: true}, ReasonPolicyChange, FlagDeny},
		{"policy, wrapped", fmt.Errorf("x: %w", &DenyError{Reason: "r"}), ReasonPolicy, FlagDeny},
		{"drain", ErrDrained, ReasonDrain, FlagNone},
		{"pod gone", ErrPodGone, ReasonPodGone, FlagNone},

		{"stream cancelled", stream(&hbone.ResetError{Code: hbone.CodeCancel, Remote: true}), ReasonReset, FlagNone},
		{"stream ended early", stream(&hbone.ResetError{Code: hbone.CodeNo, Remote: true}), ReasonReset, FlagNone},
		{"peer's application reset", stream(&hbone.ResetError{Code: hbone.CodeConnect, Remote: true}), ReasonReset, FlagNone},
		{"stream refused", stream(&hbone.ResetError{Code: hbone.CodeRefusedStream, Remote: true}), ReasonStream, FlagNone},
		{"tunnel's socket reset", stream(os.NewSyscallError("read", syscall.ECONNRESET)), ReasonTunnelLost, FlagNone},
		{"tunnel closed by GOAWAY", stream(&hbone.ConnError{Remote: true}), ReasonTunnelLost, FlagNone},
		{"certificate revoked under a stream", stream(&cert.RevokedError{}), ReasonCertRevoked, FlagCertRevoked},
		{"socket reset", socket(os.NewSyscallError("read", syscall.ECONNRESET)), ReasonReset, FlagNone},
		{"splice into a closed socket", relayed(os.NewSyscallError("splice", syscall.EPIPE)), ReasonReset, FlagNone},
		{"keepalive gave up", socket(os.NewSyscallError("read", syscall.ETIMEDOUT)), ReasonTimeout, FlagNone},
		{"something else", socket(errors.New("x")), ReasonOther, FlagNone},

		{"garbage instead of TLS", served(hbone.StageTLS, tls.RecordHeaderError{}), ReasonTLS, FlagTLS},
		{"client refuses our certificate", served(hbone.StageTLS, &net.OpError{Op: "remote error", Err: tls.AlertError(42)}), ReasonCertRefused, FlagTLS},
		{"the same, our records", served(hbone.StageH2, &record.Error{Alert: 45, Remote: true}), ReasonCertRefused, FlagTLS},
		{"our own alert", served(hbone.StageTLS, &record.Error{Alert: 42}), ReasonTLS, FlagTLS},
		{"no certificate to show", served(hbone.StageTLS, &cert.UnavailableError{Err: errors.New("x")}), ReasonNoCertificate, FlagIdentity},
		{"too many handshakes", served(hbone.StageLocal, hbone.ErrTooManyHandshakes), ReasonLimit, FlagConnect},
		{"no share left", served(hbone.StageLocal, &ledger.ExhaustedError{}), ReasonLimit, FlagConnect},

		{"application refused", DialFailed(true, syscall.ECONNREFUSED), ReasonAppRefused, FlagConnect},
		{"application silent", DialFailed(true, os.ErrDeadlineExceeded), ReasonAppTimeout, FlagConnect},
		{"client left meanwhile", DialFailed(true, context.Canceled), ReasonClientGone, FlagNone},
		{"destination silent", DialFailed(false, os.ErrDeadlineExceeded), ReasonDstTimeout, FlagConnect},
		{"said", Failed(ReasonUnknownWorkload, errors.New("x")), ReasonUnknownWorkload, FlagNone},
		{"said, over what it is", Failed(ReasonNoEndpoint, syscall.ECONNREFUSED), ReasonNoEndpoint, FlagConnect},
		{"only a flag", Flagged(FlagNetworkPolicy, errors.New("x")), ReasonHBONETimeout, FlagNetworkPolicy},
		{"a flag and a type", Flagged(FlagTLS, &cert.VerifyError{Reason: "expired at x"}), ReasonCertExpired, FlagTLS},
		{"anything", errors.New("x"), ReasonOther, FlagNone},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := reasonOf(c.err); got != c.want || flagOf(c.err) != c.flag {
				t.Errorf("reason %s and flag %s, want %s and %s", got, flagOf(c.err), c.want, c.flag)
			}
		})
	}
}
