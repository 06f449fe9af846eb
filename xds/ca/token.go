package ca

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

const (
	tokenKeyFile = "token-key.pem"
	// TokenIssuer is the "iss" of tokens that ambitd mints.
	TokenIssuer = "https://ambitd.ambit-system.svc"
	// DefaultAudience is the one that proxies of the mesh use.
	DefaultAudience = "istio-ca"
	// tokenLeeway allows for clocks of nodes that mint and check.
	tokenLeeway = 30 * time.Second
	// maxToken bounds what the parser sees; a projected token has some 1300 bytes.
	maxToken = 16 << 10
)

// claims is a JWT in the layout of Kubernetes' projected service account
// tokens, so that one reader serves both.
type claims struct {
	jwt.Claims
	Kubernetes kubernetesClaims `json:"kubernetes.io"`
}

type kubernetesClaims struct {
	Namespace      string       `json:"namespace"`
	Pod            *boundObject `json:"pod,omitempty"`
	Node           *boundObject `json:"node,omitempty"`
	ServiceAccount boundObject  `json:"serviceaccount"`
}

type boundObject struct {
	Name string `json:"name"`
	UID  string `json:"uid,omitempty"`
}

// Tokens mints and reviews JWTs signed by a key in the state directory. It
// stands where Kubernetes' TokenRequest and TokenReview do in a cluster.
type Tokens struct {
	key       *ecdsa.PrivateKey
	audiences []string
	now       func() time.Time
}

// OpenTokens loads the signing key, or makes it on first use. Review accepts a
// token for any of the audiences (none: DefaultAudience).
func OpenTokens(stateDir string, audiences []string, now func() time.Time) (*Tokens, error) {
	if now == nil {
		now = time.Now
	}
	if len(audiences) == 0 {
		audiences = []string{DefaultAudience}
	}
	if err := makeStateDir(stateDir); err != nil {
		return nil, err
	}
	unlock, err := lockDir(stateDir) // `ambitd token` may run beside a starting `ambitd serve`
	if err != nil {
		return nil, err
	}
	defer unlock()
	key, err := openTokenKey(filepath.Join(stateDir, tokenKeyFile))
	if err != nil {
		return nil, err
	}
	return &Tokens{key: key, audiences: audiences, now: now}, nil
}

func openTokenKey(path string) (*ecdsa.PrivateKey, error) {
	data, err := readKey(path)
	if errors.Is(err, fs.ErrNotExist) {
		return makeTokenKey(path)
	}
	if err != nil {
		return nil, fmt.Errorf("token key: %w", err)
	}
	signer, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("token key %s %w", path, err)
	}
	key, ok := signer.(*ecdsa.PrivateKey)
	if !ok || key.Curve.Params().Name != "P-256" {
		return nil, fmt.Errorf("token key %s is not ECDSA P-256: remove it to have one made", path)
	}
	return key, nil
}

func makeTokenKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	pem, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	return key, writeFile(path, pem, 0o600)
}

// Mint makes a token that says it is caller, for one audience.
func (t *Tokens) Mint(c Caller, audience string, ttl time.Duration) (string, error) {
	switch {
	case c.Namespace == "" || c.ServiceAccount == "":
		return "", errors.New("mint token: namespace and service account are needed")
	case ttl <= 0:
		return "", fmt.Errorf("mint token: a life of %s is not positive", ttl)
	}
	if audience == "" {
		audience = t.audiences[0]
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: t.key}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", fmt.Errorf("mint token: %w", err)
	}
	now := t.now()
	cl := claims{
		Claims: jwt.Claims{
			Issuer: TokenIssuer, Audience: jwt.Audience{audience},
			Subject:  "system:serviceaccount:" + c.Namespace + ":" + c.ServiceAccount,
			IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(ttl)),
		},
		Kubernetes: kubernetesClaims{Namespace: c.Namespace, ServiceAccount: boundObject{Name: c.ServiceAccount}},
	}
	if c.PodName != "" {
		cl.Kubernetes.Pod = &boundObject{Name: c.PodName, UID: c.PodUID}
	}
	if c.Node != "" {
		cl.Kubernetes.Node = &boundObject{Name: c.Node}
	}
	s, err := jwt.Signed(signer).Claims(cl).Serialize()
	if err != nil {
		return "", fmt.Errorf("mint token: %w", err)
	}
	return s, nil
}

// Review implements TokenReviewer. The token itself never appears in an error.
func (t *Tokens) Review(_ context.Context, token string) (Caller, error) {
	if token == "" {
		return Caller{}, &UnauthenticatedError{"no bearer token: send `authorization: Bearer <token>`"}
	}
	if len(token) > maxToken {
		return Caller{}, &UnauthenticatedError{fmt.Sprintf("the token has %d bytes, at most %d are read", len(token), maxToken)}
	}
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return Caller{}, &UnauthenticatedError{"the token is not a JWT signed with ES256"}
	}
	var cl claims
	if err := parsed.Claims(&t.key.PublicKey, &cl); err != nil {
		return Caller{}, &UnauthenticatedError{"the token is not signed by this ambitd's key: mint it with this --state-dir"}
	}
	if err := t.checkClaims(&cl); err != nil {
		return Caller{}, err
	}
	k := cl.Kubernetes
	c := Caller{Namespace: k.Namespace, ServiceAccount: k.ServiceAccount.Name}
	if k.Pod != nil {
		c.PodName, c.PodUID = k.Pod.Name, k.Pod.UID
	}
	if k.Node != nil {
		c.Node = k.Node.Name
	}
	return c, nil
}

func (t *Tokens) checkClaims(cl *claims) error {
	// jwt.Validate takes an absent expiry for "never": ours must have one.
	if cl.Expiry == nil {
		return &UnauthenticatedError{"the token has no expiry"}
	}
	err := cl.ValidateWithLeeway(jwt.Expected{Issuer: TokenIssuer, AnyAudience: t.audiences, Time: t.now()}, tokenLeeway)
	switch {
	case errors.Is(err, jwt.ErrExpired):
		return &UnauthenticatedError{"the token expired at " + cl.Expiry.Time().UTC().Format(time.RFC3339) + ": mint another"}
	case errors.Is(err, jwt.ErrNotValidYet), errors.Is(err, jwt.ErrIssuedInTheFuture):
		return &UnauthenticatedError{"the token is not valid yet: check the clocks of both machines"}
	case errors.Is(err, jwt.ErrInvalidAudience):
		return &UnauthenticatedError{fmt.Sprintf("the token is for audience %q, wanted one of %q", []string(cl.Audience), t.audiences)}
	case errors.Is(err, jwt.ErrInvalidIssuer):
		return &UnauthenticatedError{fmt.Sprintf("the token's issuer is %q, wanted %q", cl.Issuer, TokenIssuer)}
	case err != nil:
		return &UnauthenticatedError{"the token's claims are not valid: " + err.Error()}
	}
	k := cl.Kubernetes
	if k.Namespace == "" || k.ServiceAccount.Name == "" {
		return &UnauthenticatedError{"the token names no namespace and service account (claim kubernetes.io)"}
	}
	if want := "system:serviceaccount:" + k.Namespace + ":" + k.ServiceAccount.Name; cl.Subject != want {
		return &UnauthenticatedError{fmt.Sprintf("the token's subject is %q, its claims say %q", cl.Subject, want)}
	}
	return nil
}
