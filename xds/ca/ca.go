// Package ca is the mesh's certificate authority: it turns a request by an
// authenticated caller into a short-lived X.509-SVID.
//
//	token ─ TokenReviewer ─▶ Caller ─ NodeRule ─▶ identity ─ Authority.Sign ─▶ leaf, intermediates, roots
//
// Who asks is decided by the token alone and what they get by NodeRule alone;
// the names inside the signing request are ignored. There is no anonymous way
// in. The package knows no gRPC: the three error types say which status fits.
//
// All exported types are safe for concurrent use. Authority.Run, once it runs,
// follows the files of the CA, which the commands of rotation.go change; no
// other goroutines are started.
package ca

import (
	"context"
	"fmt"

	"github.com/ambit-mesh/ambit/xds/identity"
)

// Caller is who presented a token.
type Caller struct {
	Namespace      string
	ServiceAccount string
	// PodName, PodUID and Node are what the token is bound to; empty when it
	// is not bound.
	PodName string
	PodUID  string
	Node    string
}

// Account is "namespace/serviceaccount".
func (c Caller) Account() string { return c.Namespace + "/" + c.ServiceAccount }

func (c Caller) String() string {
	if c.PodName == "" {
		return c.Account()
	}
	return fmt.Sprintf("%s (pod %s on node %s)", c.Account(), c.PodName, c.Node)
}

// TokenReviewer authenticates a bearer token. Errors are *UnauthenticatedError.
type TokenReviewer interface {
	Review(ctx context.Context, token string) (Caller, error)
}

// Placement knows where workloads run.
type Placement interface {
	// RunsOn reports whether a live pod with this identity is on the node.
	RunsOn(node string, id identity.ID) bool
}

// UnauthenticatedError says that a token proves nothing.
type UnauthenticatedError struct{ Reason string }

func (e *UnauthenticatedError) Error() string { return "unauthenticated: " + e.Reason }

// DeniedError says that an authenticated caller may not have what it asks.
type DeniedError struct {
	Caller Caller
	Reason string
}

func (e *DeniedError) Error() string { return e.Caller.String() + ": " + e.Reason }

// InvalidError says that a request cannot be fulfilled for anyone.
type InvalidError struct{ Reason string }

func (e *InvalidError) Error() string { return e.Reason }
