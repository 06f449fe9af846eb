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
	if len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "XDS_ON_DEMAND=true is not supported by this build") {
		t.Errorf("warnings %q", c.Warnings)
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

func TestTokenIsAFileOrAJWT(t *testing.T) {
	if tok, err := (&Config{AuthToken: "a.b.c"}).token(); err != nil || tok != "a.b.c" {
		t.Errorf("literal: %q, %v", tok, err)
	}
	if tok, err := (&Config{AuthToken: "./var/run/secrets/tokens/none"}).token(); err == nil {
		t.Errorf("a path that does not exist was taken for a token: %q", tok)
	}
}
