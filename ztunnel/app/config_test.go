package app

import (
	"io"
	"strings"
	"testing"
	"time"
)

func TestConfigFromEnvironmentAndFlags(t *testing.T) {
	c, err := Parse([]string{"proxy", "--network", "flagged", "--connection-termination-deadline=7s"}, []string{
		"NODE_NAME=n1", "XDS_ADDRESS=https://ambitd.ambit-system.svc:15012", "NETWORK=env", "PACKET_MARK=0x539", "RUST_LOG=debug",
		"TERMINATION_GRACE_PERIOD_SECONDS=30", "XDS_HEADER_X=1", "ISTIO_META_FOO=bar", "XDS_ON_DEMAND=true", "ISTIO_META_DNS_CAPTURE=false",
	}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if c.XDSAddress != "ambitd.ambit-system.svc:15012" || c.CAAddress != c.XDSAddress || c.Network != "flagged" || c.PacketMark != 0x539 ||
		c.TerminationDeadline != 7*time.Second || c.LogLevel != "debug" || c.XDSHeaders["x"] != "1" || c.Metadata["FOO"] != "bar" {
		t.Errorf("%+v", c)
	}
	if len(c.Warnings) != 2 || !strings.Contains(c.Warnings[0], "XDS_ON_DEMAND=true is not supported by this build") {
		t.Errorf("warnings %q", c.Warnings)
	}
}

func TestSettingsThatAreNotFollowedAreNamed(t *testing.T) {
	base := []string{"NODE_NAME=n1", "XDS_ADDRESS=x:1"}
	for _, c := range []struct {
		env  string
		want bool
	}{
		{"KEEPALIVE_ENABLED=false", true},
		{"KEEPALIVE_ENABLED=TRUE", false},
		{"KEEPALIVE_TIME=10s", true},
		{"KEEPALIVE_TIME=180s", false},
		{"KEEPALIVE_INTERVAL=3m", false},
		{"KEEPALIVE_RETRIES=3", true},
		{"KEEPALIVE_RETRIES=9", false},
		{"INPOD_PORT_REUSE=false", true},
		{"INPOD_PORT_REUSE=true", false},
		{"HTTP2_STREAM_WINDOW_SIZE=65535", true},
		{"HTTP2_CONNECTION_WINDOW_SIZE=65535", true},
		{"HTTP2_FRAME_SIZE=16384", true},
		{"AUTHZ_POLICY_INFO_LOGGING=true", true},
		{"AUTHZ_POLICY_INFO_LOGGING=false", false},
		{"PROXY_MODE=dedicated", true},
		{"CRL_PATH=", false},
	} {
		got, err := Parse(nil, append(base, c.env), io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if (len(got.Warnings) == 1) != c.want || c.want && !strings.HasPrefix(got.Warnings[0], c.env+" is not supported") {
			t.Errorf("%s: warnings %q", c.env, got.Warnings)
		}
	}
}

// The agent's rules must outlive the proxy's drain: the defaults agree, and a
// longer drain says what the agent needs.
func TestDrainFitsTheAgents(t *testing.T) {
	for _, c := range []struct{ env, want string }{
		{"CONNECTION_TERMINATION_DEADLINE=5s", ""},
		{"CONNECTION_TERMINATION_DEADLINE=1s", ""},
		{"TERMINATION_GRACE_PERIOD_SECONDS=30", "--unenrol-drain=25s or more (its default is 5s)"},
		{"UNRELATED=1", ""},
	} {
		got, err := Parse(nil, []string{"NODE_NAME=n1", "XDS_ADDRESS=x:1", c.env}, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if said := strings.Join(got.Warnings, "\n"); !strings.Contains(said, c.want) || c.want == "" && said != "" {
			t.Errorf("%s: warnings %q, want %q", c.env, said, c.want)
		}
	}
}

func TestConfigRefusesAllMistakesAtOnce(t *testing.T) {
	_, err := Parse([]string{"--log-level", "loud", "extra"}, []string{"XDS_ADDRESS=http://x:1", "CA_ADDRESS=nowhere", "SECRET_TTL=soon"}, io.Discard)
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"NODE_NAME", "XDS_ADDRESS", "scheme must be https", "CA_ADDRESS", "SECRET_TTL", "LOG_LEVEL", "unexpected arguments"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error does not name %s: %v", want, err)
		}
	}
}

// The usage text lists what settings are now, and a mistyped flag prints it.
func TestUsageKeepsTheToken(t *testing.T) {
	for _, arg := range []string{"--help", "--no-such-flag"} {
		var out strings.Builder
		_, err := Parse([]string{arg}, []string{"NODE_NAME=n1", "XDS_ADDRESS=x:1", "AUTH_TOKEN=head.secret.tail"}, &out)
		if err == nil || !strings.Contains(out.String(), "-auth-token") || strings.Contains(out.String()+err.Error(), "head.secret") {
			t.Errorf("%s: %v, usage: %s", arg, err, out.String())
		}
	}
}

func TestTokenIsAFileOrAJWT(t *testing.T) {
	if tok, err := (&Config{AuthToken: "a.b.c"}).token(); err != nil || tok != "a.b.c" {
		t.Errorf("literal: %q, %v", tok, err)
	}
	if tok, err := (&Config{AuthToken: "./var/run/secrets/tokens/none"}).token(); err == nil {
		t.Errorf("a path that does not exist was taken for a token: %q", tok)
	}
}
