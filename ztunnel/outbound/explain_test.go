package outbound

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
)

// TestFailuresSayWhoRefusedAndWhy: one line of the log is enough to know where
// to look.
func TestFailuresSayWhoRefusedAndWhy(t *testing.T) {
	plan := Plan{Transport: flow.HBONE, Addr: netip.MustParseAddrPort("10.0.0.2:15008"), Authority: "10.0.0.2:8080"}
	at := func(s hbone.Stage, err error) error { return &hbone.DialError{Stage: s, Addr: plan.Addr, Err: err} }
	server := "spiffe://cluster.local/ns/default/sa/other"
	for _, c := range []struct {
		name string
		err  error
		flag flow.Flag
		want []string
	}{
		{"policy", &hbone.StatusError{Code: 401}, flow.FlagDeny, []string{"denied by destination's policy", "10.0.0.2:15008 refused 10.0.0.2:8080", "401"}},
		{"application", &hbone.StatusError{Code: 503}, flow.FlagConnect, []string{"10.0.0.2:15008 could not reach 10.0.0.2:8080", "does the application listen there?", "503"}},
		{"other status", &hbone.StatusError{Code: 400}, flow.FlagConnect, []string{"10.0.0.2:15008 refused 10.0.0.2:8080", "400"}},
		{"no answer", at(hbone.StageTCP, os.ErrDeadlineExceeded), flow.FlagNetworkPolicy, []string{"10.0.0.2:15008", "NetworkPolicy", "15008"}},
		{"no proxy", at(hbone.StageTCP, syscall.ECONNREFUSED), flow.FlagConnect, []string{"10.0.0.2:15008", "connection refused"}},
		{"wrong peer", at(hbone.StageTLS, &cert.VerifyError{Peer: server, Reason: "wrong identity", Err: errors.New("expected spiffe://x")}), flow.FlagTLS,
			[]string{"10.0.0.2:15008", server, "wrong identity", "expected spiffe://x"}},
		{"no HTTP/2", at(hbone.StageH2, errors.New("no SETTINGS")), flow.FlagH2, []string{"10.0.0.2:15008", "no SETTINGS"}},
		{"no certificate of our own", at(hbone.StageTLS, &cert.UnavailableError{ID: identity.MustParse(server), Since: time.Unix(0, 0), Err: errors.New("CA is away")}),
			flow.FlagIdentity, []string{server, "since 1970-01-01", "CA is away"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := explain(c.err, plan)
			f, ok := errors.AsType[*flow.FlagError](err)
			if !ok || f.Flag != c.flag {
				t.Errorf("%v has not the flag %s", err, c.flag)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
		})
	}
}
