package ca

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-cmp/cmp"
)

var nodeProxy = Caller{Namespace: "ambit-system", ServiceAccount: "ztunnel", PodName: "zt", PodUID: "uid-1", Node: "node-a"}

func testTokens(t testing.TB, now *time.Time) *Tokens {
	t.Helper()
	tokens, err := OpenTokens(t.TempDir(), nil, func() time.Time { return *now })
	if err != nil {
		t.Fatal(err)
	}
	return tokens
}

func TestTokenRoundTrip(t *testing.T) {
	dir := t.TempDir()
	minter, err := OpenTokens(dir, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	reviewer, err := OpenTokens(dir, nil, nil) // another process
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []Caller{nodeProxy, {Namespace: "default", ServiceAccount: "a"}} {
		token, err := minter.Mint(c, "", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		got, err := reviewer.Review(context.Background(), token)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c, got); diff != "" {
			t.Errorf("(-minted +reviewed):\n%s", diff)
		}
	}
}

func TestTokensThatProveNothing(t *testing.T) {
	now := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	tokens, stranger := testTokens(t, &now), testTokens(t, &now)
	mint := func(from *Tokens, c Caller, audience string, ttl time.Duration) string {
		s, err := from.Mint(c, audience, ttl)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	sign := func(key jose.SigningKey, cl any) string {
		signer, err := jose.NewSigner(key, nil)
		if err != nil {
			t.Fatal(err)
		}
		s, err := jwt.Signed(signer).Claims(cl).Serialize()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	own := func(change func(*claims)) string {
		cl := claims{
			Claims: jwt.Claims{
				Issuer: TokenIssuer, Audience: jwt.Audience{DefaultAudience}, Subject: "system:serviceaccount:a:b",
				Expiry: jwt.NewNumericDate(now.Add(time.Hour)),
			},
			Kubernetes: kubernetesClaims{Namespace: "a", ServiceAccount: boundObject{Name: "b"}},
		}
		change(&cl)
		return sign(jose.SigningKey{Algorithm: jose.ES256, Key: tokens.key}, cl)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	good := mint(tokens, nodeProxy, "", time.Hour)
	part := strings.Split(good, ".")
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + part[1] + "."
	tests := []struct {
		name, token string
		later       time.Duration
		want        string
	}{
		{"none", "", 0, "no bearer token"},
		{"not a JWT", "abc", 0, "not a JWT"},
		{"too long", strings.Repeat("a", maxToken+1), 0, "at most"},
		{"another ambitd's key", mint(stranger, nodeProxy, "", time.Hour), 0, "not signed by this ambitd"},
		{"changed claims", part[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"x"}`)) + "." + part[2], 0, "not signed"},
		{"algorithm none", none, 0, "not a JWT signed with ES256"},
		{"HMAC", sign(jose.SigningKey{Algorithm: jose.HS256, Key: []byte(strings.Repeat("k", 32))}, claims{}), 0, "not a JWT signed with ES256"},
		{"RSA", sign(jose.SigningKey{Algorithm: jose.RS256, Key: rsaKey}, claims{}), 0, "not a JWT signed with ES256"},
		{"expired", good, time.Hour + tokenLeeway + time.Second, "expired"},
		{"for another audience", mint(tokens, nodeProxy, "vault", time.Hour), 0, "audience"},
		{"from the future", good, -tokenLeeway - time.Second, "not valid yet"},
		{"another issuer", own(func(c *claims) { c.Issuer = "https://kubernetes.default.svc" }), 0, "issuer"},
		{"without expiry", own(func(c *claims) { c.Expiry = nil }), 0, "no expiry"},
		{"without namespace", own(func(c *claims) { c.Kubernetes.Namespace = "" }), 0, "names no namespace"},
		{"subject of another account", own(func(c *claims) { c.Subject = "system:serviceaccount:kube-system:admin" }), 0, "subject"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			begin := now
			now = now.Add(tt.later)
			defer func() { now = begin }()
			c, err := tokens.Review(context.Background(), tt.token)
			if _, ok := errors.AsType[*UnauthenticatedError](err); !ok || !strings.Contains(err.Error(), tt.want) || c != (Caller{}) {
				t.Fatalf("got %v, %v, want an *UnauthenticatedError with %q", c, err, tt.want)
			}
			if tt.token != "" && len(tt.token) > 20 && strings.Contains(err.Error(), tt.token) {
				t.Error("the error shows the token")
			}
		})
	}
	now = now.Add(time.Hour + tokenLeeway - time.Second)
	if _, err := tokens.Review(context.Background(), good); err != nil {
		t.Errorf("within the leeway: %v", err)
	}
}

func TestMintRefusesNonsense(t *testing.T) {
	now := time.Now()
	tokens := testTokens(t, &now)
	if _, err := tokens.Mint(Caller{}, "", time.Hour); err == nil {
		t.Error("minted for nobody")
	}
	if _, err := tokens.Mint(nodeProxy, "", 0); err == nil {
		t.Error("minted without a life")
	}
}

func FuzzToken(f *testing.F) {
	now := time.Now()
	tokens := testTokens(f, &now)
	good, err := tokens.Mint(nodeProxy, "", time.Hour)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add("a.b.c")
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Fuzz(func(t *testing.T, token string) {
		c, err := tokens.Review(context.Background(), token)
		// The only token this key signed is good; some encodings of it decode
		// to the same bytes.
		if err == nil && c != nodeProxy {
			t.Fatalf("forged %v", c)
		}
	})
}
