package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/perf/topo"
	"github.com/ambit-mesh/ambit/test/netlab"
)

func TestOptions(t *testing.T) {
	tests := []struct {
		args string
		err  string
	}{
		{"", ""}, {"--quick", ""}, {"ask-1 --all -o json", ""}, {"--quick --all", "exclude"}, {"-o yaml", "table or json"},
		{"--modes none,zt", `"zt" is neither`}, {"--access-log maybe", "on or off"}, {"--env NAME", "NAME=VALUE"},
		{"--peer x", "NAME=PROGRAM"}, {"--peer tls=/bin/sh", "taken"}, {"--peer x=/no/such", "no such file"}, {"--peer x=/bin/sh", ""},
		{"--peer nginx=/bin/sh", ""}, {"--peer a:envoy=/bin/sh", ""}, {"--peer a:squid=/bin/sh", `kind "squid"`},
		{"--rounds -1", "1 to 1000"}, {"--rounds 0", "1 to 1000"}, {"--rounds 1001", "1 to 1000"}, {"--rounds x", "1 to 1000"},
		{"--for -1s", "as 500ms"}, {"--for 0s", "as 500ms"}, {"--for 5", "as 500ms"}, {"--for 2h", "as 500ms"}, {"--warm -1s", "as 500ms"}, {"--warm 0s", ""},
		{"--peer=zt=/bin/sh --modes ambit,zt", ""}, {"--peer zt=/bin/sh --modes ambit", "add zt to --modes"}, {"--modes=", "one mode or more"}, {"--modes ambit,,tls", ""},
		{"--max-steal NaN", "0 to 1"}, {"--max-steal 2", "0 to 1"}, {"--json /", "cannot be written"}, {"--no-such", "-h lists"},
		{"--peer a=/bin/sh --peer a=/bin/cat", "twice"}, {"--peer a=/tmp", "not a program"}, {"--env =x", "NAME=VALUE"}, {"--modes none,none", "twice"},
		{"--max-steal -1", "max-steal"}, {"--json /no/such/x", "directory that exists"}, {"--html /no/such/x", "directory that exists"}, {"--json /dev/null", ""}, {"--json x", ""},
	}
	for _, tt := range tests {
		_, err := runOptions(strings.Fields(tt.args), io.Discard)
		if (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: %v, want %q", tt.args, err, tt.err)
		}
	}
	if _, err := os.Stat("x"); err == nil {
		t.Error("asking whether a file can be written left it")
	}
	o, err := runOptions(strings.Fields("bulk --quick --peer b=/bin/sh --peer a=/bin/sh --access-log off ask"), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(o.words, []string{"bulk", "ask"}) || !slices.Equal(o.modes[len(topo.BuiltIn):], []string{"a", "b"}) ||
		o.settings.AccessLog || !slices.Contains(o.settings.Env, "RUST_LOG=info,access=off") || o.settings.For == 0 {
		t.Errorf("%+v", o)
	}
}

func TestCommandLine(t *testing.T) {
	for _, tt := range []struct {
		args string
		code int
		want string
	}{
		{"", 2, "Usage:"}, {"help", 0, "Usage:"}, {"measure", 2, "unknown command"}, {"list", 0, "cross-node/bulk-up-1x64k"}, {"version", 0, "ambit-perf"},
		{"run -h", 0, "-peer"}, {"help run", 0, "-peer"}, {"help x", 0, "Usage:"}, {"list no-such", 2, "no scenario"}, {"list --x", 2, "-h lists"}, {"version x", 2, "unexpected"},
		{"sizing --pods -1 /no/such", 2, "--pods -1"}, {"sizing --gb NaN /no/such", 2, "--gb NaN"},
		{"run --peer nginx=/bin/sh cross-node/ask-1$", 2, "begin with http-hop/"}, {"run --modes net-http cross-node/ask-1$", 2, "none of the modes"},
		{"run --bin /no/such cross-node/ask-1$", 1, "make build"}, {"compare one", 2, "two files"}, {"show /no/such", 1, "no such file"}, {"run no-such-load", 2, "no scenario matches"}, {topo.Client, 2, "itself"},
	} {
		var out bytes.Buffer
		if code := run(t.Context(), strings.Fields(tt.args), &out, &out); code != tt.code || !strings.Contains(out.String(), tt.want) {
			t.Errorf("%q: exit status %d, %s", tt.args, code, out.String())
		}
	}
}

// TestEveryMode measures for an instant over each mode in a real lab, with our own
// proxy as the peer too, and looks at what a user gets.
func TestEveryMode(t *testing.T) {
	netlab.Require(t)
	dir := t.TempDir()
	build := exec.Command("go", "build", "-o", dir+"/", "./xds/cmd/ambitd", "./ztunnel/cmd/ztunnel", "./ebpf/cmd/ambit-node", "./ebpf/cmd/ambit-cni",
		"./test/cmd/ambit-lab", "./test/cmd/ambit-sample", "./perf/cmd/ambit-perf")
	build.Dir = "../../.."
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build programs: %v\n%s", err, out)
	}
	perf := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), filepath.Join(dir, "ambit-perf"), args...).CombinedOutput()
		if err != nil {
			t.Fatalf("ambit-perf %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	modes := append(slices.Clone(topo.BuiltIn), "peer")
	if reason := netlab.EBPF(); reason != nil {
		// Leases are programs of the kernel.
		modes = slices.DeleteFunc(modes, func(m string) bool { return m == topo.Accelerated })
	}
	kept, page := filepath.Join(dir, "r.json"), filepath.Join(dir, "r.html")
	out := perf("run", "--rounds", "1", "--warm", "30ms", "--for", (150 * time.Millisecond).String(), "--peer", "peer="+filepath.Join(dir, "ztunnel"), "--modes", strings.Join(modes, ","),
		"--max-steal", "1", "--json", kept, "--html", page, "ask-1$", "bulk-up-1x64k", "cross.*(down-4x16k|connect-1$|rate-500|idle-500)")
	for _, m := range modes {
		for _, p := range []topo.Placement{topo.Cross, topo.Same} {
			if want := fmt.Sprintf("%s/ask-1 · %s · round 1 · ", p, m); (topo.Config{}).Supports(m, p) != strings.Contains(out, want) {
				t.Errorf("%q is missing, or there", want)
			}
		}
	}
	if strings.Contains(out, "failed:") || strings.Contains(out, "errors, the first") || !strings.Contains(out, "X25519") {
		t.Errorf("runs failed, or nothing was encrypted:\n%s", out)
	}
	if shown := perf("show", kept); !strings.Contains(out, shown) {
		t.Errorf("shown later:\n%s\nthen:\n%s", shown, out)
	}
	if b, err := os.ReadFile(page); err != nil || !bytes.Contains(b, []byte("</html>")) {
		t.Errorf("the page: %v", err)
	}
	if out := perf("compare", kept, kept); !strings.Contains(out, "1.00") {
		t.Errorf("compared with itself:\n%s", out)
	}
}
