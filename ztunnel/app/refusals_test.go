package app

import (
	"crypto/x509"
	"encoding/json"
	"log/slog"
	"net"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
)

// TestRefusalsPage: what refused peers met is one row, as JSON and as text.
func TestRefusalsPage(t *testing.T) {
	c := Defaults()
	c.NodeName = "n1"
	a := assemble(c, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), nil)
	defer a.node.store.Close()
	get := func(url string) (int, string) {
		w := httptest.NewRecorder()
		a.refusals().ServeHTTP(w, httptest.NewRequest("GET", url, nil))
		return w.Code, w.Body.String()
	}
	if _, body := get("/refusals"); strings.TrimSpace(body) != "[]" {
		t.Errorf("empty: %q", body)
	}
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	for range 3 {
		a.node.refused(handoff.Pod{UID: "p"}, ours, &hbone.ServeError{Stage: hbone.StageTLS,
			Err: &cert.VerifyError{Peer: "spiffe://other/ns/x/sa/y", Reason: "not trusted", Err: x509.UnknownAuthorityError{}}})
	}
	a.node.refused(handoff.Pod{UID: "p"}, ours, &hbone.ServeError{Stage: hbone.StageLocal, Err: hbone.ErrTooManyHandshakes})
	_, body := get("/refusals")
	var rows []flow.Refusal
	if err := json.Unmarshal([]byte(body), &rows); err != nil {
		t.Fatal(err)
	}
	got := map[flow.Reason]uint64{}
	for _, r := range rows {
		got[r.Reason] = r.Count
	}
	if len(rows) != 2 || got[flow.ReasonCertUnknownRoot] != 3 || got[flow.ReasonLimit] != 1 {
		t.Errorf("%s", body)
	}
	if _, body := get("/refusals?format=text"); strings.Count(body, "\n") != 3 || !strings.HasPrefix(body, "COUNT") || !strings.Contains(body, "spiffe://other/ns/x/sa/y") {
		t.Errorf("%s", body)
	}
	if code, _ := get("/refusals?format=xml"); code != 400 {
		t.Errorf("unknown format: %d", code)
	}
}
