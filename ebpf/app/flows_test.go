package app

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/ebpf/sockdiag"
)

func TestFlowsTable(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	l := &flowLister{node: map[netip.Addr]bool{netip.MustParseAddr("10.1.0.1"): true}}
	older := map[uint64]bool{3: true}
	addr := netip.MustParseAddrPort
	var flows []Flow
	for _, f := range []redirect.Flow{
		{
			Source: addr("10.1.0.7:40000"), Destination: addr("10.96.0.1:80"), Via: addr("127.70.1.2:15001"), Decision: redirect.Captured,
			State: sockdiag.Established, Since: now.Add(-90 * time.Second), Sent: 10, Received: 2000, Cookie: 1, Process: "evil\t\x1b[2J x", PID: 77, Cgroup: 5,
		},
		{Source: addr("10.1.0.7:40001"), Destination: addr("10.96.0.2:80"), Via: addr("10.1.0.8:8080"), Decision: redirect.Direct, State: sockdiag.Established, Cookie: 2},
		{Source: addr("10.1.0.7:40002"), Destination: addr("10.2.0.1:5432"), Decision: redirect.Outside, State: sockdiag.Established, Cookie: 3},
		{Inbound: true, Source: addr("10.1.0.1:50000"), Destination: addr("10.1.0.7:8080"), Decision: redirect.Outside, State: sockdiag.CloseWait, Cookie: 4},
		{Inbound: true, Source: addr("10.3.0.1:50000"), Destination: addr("10.1.0.7:8080"), Decision: redirect.Outside, State: sockdiag.Established, Cookie: 5},
		{Source: addr("10.1.0.7:40003"), Destination: addr("10.2.0.1:9000"), Decision: redirect.Excluded, State: sockdiag.SynSent, Cookie: 6},
	} {
		flows = append(flows, l.flow("shop/web", f, older))
	}
	var out bytes.Buffer
	if err := printFlows(&out, flows, now); err != nil {
		t.Fatal(err)
	}
	want := strings.TrimLeft(`
POD        PROCESS             SOURCE           DESTINATION     DECISION        VIA             STATE         AGE     SENT   RECEIVED
shop/web   evil__[2J_x[77]     10.1.0.7:40000   10.96.0.1:80    captured        ztunnel         established   1m30s   10     2000
shop/web   -                   10.1.0.7:40001   10.96.0.2:80    direct          10.1.0.8:8080   established   -       0      0
shop/web   -                   10.1.0.7:40002   10.2.0.1:5432   pre-enrolment   -               established   -       0      0
shop/web   -                   10.1.0.1:50000   10.1.0.7:8080   probe           -               close-wait    -       0      0
shop/web   -                   10.3.0.1:50000   10.1.0.7:8080   outside         -               established   -       0      0
shop/web   -                   10.1.0.7:40003   10.2.0.1:9000   excluded        -               syn-sent      -       0      0
`, "\n")
	squeeze := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	if squeeze(out.String()) != squeeze(want) {
		t.Errorf("table is\n%s\nwant\n%s", out.String(), want)
	}
	out.Reset()
	if err := printFlows(&out, nil, now); err != nil || out.String() != "no pod in the mesh has a connection\n" {
		t.Errorf("table of nothing is %q, %v", out.String(), err)
	}
}

func TestFlowsCommandLine(t *testing.T) {
	dir := t.TempDir()
	for _, tc := range []struct {
		args []string
		code int
		say  string
	}{
		{[]string{"--status-dir", dir}, 0, "no pod in the mesh has a connection"},
		{[]string{"--status-dir", dir, "-o", "json"}, 0, `"flows": []`},
		{[]string{"--status-dir", dir, "--pod", "shop/web"}, 1, "no such pod"},
		{[]string{"--status-dir", dir, "--pod", "web"}, 2, "want NAMESPACE/NAME"},
		{[]string{"--status-dir", dir + "/none"}, 1, "has the agent run"},
		{[]string{"-o", "xml"}, 2, "want json or table"},
		{[]string{"--interval", "1ns"}, 2, "want 10ms or more"},
		{[]string{"extra"}, 2, "extra"},
	} {
		var out bytes.Buffer
		code := Main(t.Context(), append([]string{"flows", "--bpffs-dir", dir + "/bpf"}, tc.args...), &out, &out)
		if code != tc.code || !strings.Contains(out.String(), tc.say) {
			t.Errorf("%v: status %d, %q; want %d and %q", tc.args, code, out.String(), tc.code, tc.say)
		}
	}
}
