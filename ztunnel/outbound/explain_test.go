package outbound

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/record"
)

// TestFailuresSayWhoRefusedAndWhy: one line of the log is enough to know where
// to look.
func TestFailuresSayWhoRefusedAndWhy(t *testing.T) {
	plan := Plan{Transport: flow.HBONE, Addr: netip.MustParseAddrPort("10.0.0.2:15008"), Authority: "10.0.0.2:8080"}
	at := func(s hbone.Stage, err error) error { return &hbone.DialError{Stage: s, Addr: plan.Addr, Err: err} }
	server := "spiffe://cluster.local/ns/default/sa/other"
	verify := func(reason string, err error) error {
		return at(hbone.StageTLS, &cert.VerifyError{Peer: server, Reason: reason, Err: err})
	}
	alert := func(code record.Alert) error { return &record.Error{Alert: code, Remote: true} }
	for _, c := range []struct {
		name   string
		err    error
		flag   flow.Flag
		reason flow.Reason
		want   []string
	}{
		{"policy", &hbone.StatusError{Code: 401}, flow.FlagDeny, flow.ReasonPolicy,
			[]string{"denied by destination's policy", "10.0.0.2:15008 refused 10.0.0.2:8080", "401"}},
		{"application", &hbone.StatusError{Code: 503}, flow.FlagConnect, flow.ReasonAppRefused,
			[]string{"10.0.0.2:15008 could not reach 10.0.0.2:8080", "does the application listen there?", "503"}},
		{"other status", &hbone.StatusError{Code: 400}, flow.FlagConnect, flow.ReasonBadRequest,
			[]string{"10.0.0.2:15008 refused 10.0.0.2:8080", "400"}},
		{"no answer", at(hbone.StageTCP, os.ErrDeadlineExceeded), flow.FlagNetworkPolicy, flow.ReasonHBONETimeout,
			[]string{"10.0.0.2:15008", "NetworkPolicy", "15008"}},
		{"no proxy", at(hbone.StageTCP, syscall.ECONNREFUSED), flow.FlagConnect, flow.ReasonHBONERefused,
			[]string{"nobody listens for HBONE at 10.0.0.2:15008", "connection refused"}},
		{"no way", at(hbone.StageTCP, syscall.EHOSTUNREACH), flow.FlagConnect, flow.ReasonHBONEConnect,
			[]string{"10.0.0.2:15008", "no route to host"}},
		{"wrong peer", verify("wrong identity", errors.New("expected spiffe://x")), flow.FlagTLS, flow.ReasonCertIdentity,
			[]string{"certificate of destination not accepted", "10.0.0.2:15008", server, "wrong identity", "expected spiffe://x"}},
		{"expired", verify("expired at 2026-01-01T00:00:00Z", nil), flow.FlagTLS, flow.ReasonCertExpired,
			[]string{"certificate of destination not accepted", server, "expired at 2026-01-01"}},
		{"clock", verify("not valid before 2026-01-01T00:00:00Z (is a clock wrong?)", nil), flow.FlagTLS, flow.ReasonCertNotYetValid,
			[]string{"is a clock wrong?"}},
		{"unknown root", verify("not trusted", x509.UnknownAuthorityError{}), flow.FlagTLS, flow.ReasonCertUnknownRoot,
			[]string{"not trusted", "unknown authority"}},
		{"trust domain without roots", verify("no roots are known for trust domain other", nil), flow.FlagTLS, flow.ReasonCertUnknownRoot,
			[]string{"no roots are known for trust domain other"}},
		{"revoked", at(hbone.StageTLS, &cert.RevokedError{Subject: server, Serial: big.NewInt(7)}), flow.FlagCertRevoked, flow.ReasonCertRevoked,
			[]string{"certificate of destination not accepted", "revoked"}},
		{"not a workload", verify("not a workload identity", nil), flow.FlagTLS, flow.ReasonCertInvalid, []string{"not a workload identity"}},
		{"they refuse our certificate", at(hbone.StageH2, alert(42)), flow.FlagTLS, flow.ReasonCertRefused,
			[]string{"destination did not accept the certificate of this side", "bad certificate"}},
		{"they refuse our certificate, crypto/tls", at(hbone.StageH2, &net.OpError{Op: "read", Err: &net.OpError{Op: "remote error", Err: tls.AlertError(48)}}),
			flow.FlagTLS, flow.ReasonCertRefused, []string{"unknown certificate authority"}},
		{"another alert", at(hbone.StageTLS, alert(record.InternalError)), flow.FlagTLS, flow.ReasonTLS, []string{"internal error"}},
		{"no word", at(hbone.StageTLS, io.EOF), flow.FlagTLS, flow.ReasonTLS, []string{"10.0.0.2:15008 ended the handshake without a word"}},
		{"no HTTP/2", at(hbone.StageH2, errors.New("no SETTINGS")), flow.FlagH2, flow.ReasonH2, []string{"10.0.0.2:15008", "no SETTINGS"}},
		{"no certificate of our own", at(hbone.StageTLS, &cert.UnavailableError{ID: identity.MustParse(server), Since: time.Unix(0, 0), Err: errors.New("CA is away")}),
			flow.FlagIdentity, flow.ReasonNoCertificate, []string{server, "since 1970-01-01", "CA is away"}},
		{"our own bound", at(hbone.StageLocal, &ledger.ExhaustedError{Pod: "p", Resource: ledger.Streams}), flow.FlagConnect, flow.ReasonLimit,
			[]string{"bound of this node reached", "no streams left"}},
		{"CONNECT without an answer", at(hbone.StageConnect, os.ErrDeadlineExceeded), flow.FlagConnect, flow.ReasonConnectTimeout, []string{"connect"}},
		{"refused for want of room", at(hbone.StageConnect, &hbone.ResetError{Code: hbone.CodeRefusedStream, Remote: true}), flow.FlagConnect, flow.ReasonConnect,
			[]string{"refused by peer 10.0.0.2:15008 (REFUSED_STREAM)", "full or draining", "ambit_ztunnel_hbone_refused_streams_total"}},
		{"the client left", at(hbone.StageLocal, context.Canceled), flow.FlagNone, flow.ReasonClientGone, []string{"canceled"}},
		{"host name", &ResolveError{&mesh.Workload{UID: "u", Traits: &mesh.Traits{Hostname: "db.example"}}, errors.New("NXDOMAIN")}, flow.FlagConnect, flow.ReasonNoEndpoint,
			[]string{"db.example", "NXDOMAIN"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := explain(c.err, plan)
			f, ok := errors.AsType[*flow.FlagError](err)
			if !ok || f.Flag != c.flag || f.Reason != c.reason {
				t.Errorf("%v has flag %s and reason %s, want %s and %s", err, f.Flag, f.Reason, c.flag, c.reason)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
		})
	}
}

// TestPlainFailuresHaveReasons: without a tunnel, the network's answers.
func TestPlainFailuresHaveReasons(t *testing.T) {
	plan := Plan{Transport: flow.Plaintext, Addr: netip.MustParseAddrPort("10.0.0.2:80")}
	for _, c := range []struct {
		err    error
		reason flow.Reason
	}{
		{&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, flow.ReasonDstRefused},
		{&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, flow.ReasonDstTimeout},
		{&net.OpError{Op: "dial", Err: syscall.ENETUNREACH}, flow.ReasonDstUnreachable},
		{context.Canceled, flow.ReasonClientGone},
		{&flow.DenyError{Reason: "policy x/y rule 1"}, flow.ReasonPolicy},
		{flow.DialFailed(true, syscall.ECONNREFUSED), flow.ReasonAppRefused},
	} {
		if f, ok := errors.AsType[*flow.FlagError](explain(c.err, plan)); !ok || f.Reason != c.reason {
			t.Errorf("%v: %+v, want %s", c.err, f, c.reason)
		}
	}
	if f, ok := errors.AsType[*flow.FlagError](nowhere(&RouteError{Reason: "no healthy endpoint"})); !ok || f.Reason != flow.ReasonNoEndpoint || f.Flag != flow.FlagConnect {
		t.Errorf("no route: %+v", f)
	}
}
