package main

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/xds/ca"
)

func TestCommandLine(t *testing.T) {
	answer := `{"problems":[],"pending":[],"proxies":[]}`
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte(answer)) }))
	defer srv.Close()
	sick := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte(`{"problems":[{"text":"a.yaml:3 Pod x/y spec.x: unknown field"}],"proxies":[]}`))
	}))
	defer sick.Close()
	other := httptest.NewServer(http.NotFoundHandler())
	defer other.Close()
	state, authority := t.TempDir(), t.TempDir()
	if _, err := ca.Open(ca.Config{TrustDomain: "cluster.local", StateDir: authority}); err != nil {
		t.Fatal(err)
	}
	at := " --state-dir " + authority
	tests := []struct {
		args           string
		code           int
		stdout, stderr string
	}{
		{"", 2, "", "Usage:"},
		{"-h", 0, "Usage:", ""},
		{"serve -h", 0, "", "-trusted-node-accounts"},
		{"fly", 2, "", `unknown command "fly"`},
		{"version", 0, "ambitd dev", ""},
		{"version -o json", 0, `"program":"ambitd"`, ""},
		{"--sauce x", 2, "", "not defined: -sauce"},
		{"serve", 2, "", "give --source dir:PATH"},
		{"serve extra", 2, "", `unexpected argument "extra"`},
		{"--source kube:", 2, "", "give dir:PATH"},
		{"--source dir:/none --log-level loud --state-dir x", 2, "", "unknown level"},
		{"--source dir:/no/such/place --state-dir " + state, 1, "", "no such file or directory (create it"},
		{"--source dir:/x --same-node loca --state-dir x", 2, "", "valid are hbone, local"},
		{"token", 2, "", "give --state-dir"},
		{"token --state-dir " + state + " --pod p", 2, "", "go together"},
		{"token --state-dir " + state + " --ttl -1s", 1, "", "not positive"},
		{"token --state-dir " + state + " --node n --pod p --uid u", 0, "eyJ", ""},
		{"ca", 2, "ambitd ca rotate", ""},
		{"ca -h", 0, "revoke-key", ""},
		{"ca fly", 2, "", "unknown command"},
		{"ca rotate", 2, "", "give --state-dir"},
		{"ca rotate --cert x" + at, 2, "", "not defined: -cert"},
		{"ca status -o xml" + at, 2, "", "one of text, json"},
		{"ca status --state-dir " + state, 1, "", "no CA in"},
		{"ca status" + at, 0, "steady", ""},
		{"ca promote" + at, 1, "", "begin with `ambitd ca rotate`"},
		{"ca rotate" + at, 0, "ambitd ca promote", ""},
		{"ca status -o json" + at, 0, `"phase": "added"`, ""},
		{"ca promote" + at, 1, "", "may not have the new root yet"},
		{"ca promote --force" + at, 0, "ambitd ca retire", ""},
		{"ca retire" + at, 1, "", "--force to cut what uses it"},
		{"ca retire --force" + at, 0, "steady", ""},
		{"ca abandon" + at, 1, "", "no root was added"},
		{"ca revoke" + at, 2, "", "give --cert or --serial"},
		{"ca revoke --serial ten" + at, 2, "", "begins with 0x"},
		{"ca revoke --serial 0x10" + at, 0, "CRL_PATH", ""},
		{"ca status" + at, 0, "revoked", ""},
		{"ca restore" + at, 2, "", "give --key"},
		{"ca revoke-key" + at, 1, "", "say --force if the key has leaked"},
		{"ca revoke-key --force" + at, 0, "no longer trusted", ""},
		{"status --addr " + srv.URL, 0, "problems", ""},
		{"status -o json --addr " + srv.URL, 0, `"problems":[]`, ""},
		{"status --addr " + sick.URL, 1, "a.yaml:3 Pod x/y", ""},
		{"status --addr " + other.URL, 2, "", "404"},
		{"status --addr 127.0.0.1:1", 2, "", "is it running?"},
		{"status -o xml", 2, "", "one of text, json"},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			code := run(strings.Fields(tt.args), &stdout, &stderr)
			if code != tt.code || !strings.Contains(stdout.String(), tt.stdout) || !strings.Contains(stderr.String(), tt.stderr) {
				t.Errorf("exit %d, stdout %q, stderr %q; want %d, %q, %q", code, stdout.String(), stderr.String(), tt.code, tt.stdout, tt.stderr)
			}
			if strings.HasPrefix(stderr.String(), "ambitd:") && strings.Count(stderr.String(), "\n") != 1 && !strings.Contains(stderr.String(), "Usage:") {
				t.Errorf("more than one line: %q", stderr.String())
			}
		})
	}
}
