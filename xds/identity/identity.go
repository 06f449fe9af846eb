// Package identity is the SPIFFE identity of a workload as a small comparable
// value: spiffe://<trust domain>/ns/<namespace>/sa/<service account>.
//
// An ID is one pointer to an interned record, so comparing, hashing and
// reading its parts cost nothing and allocate nothing. Values are immutable
// and safe for any goroutine. The package does not verify certificates.
package identity

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"unique"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	scheme = "spiffe://"
	// SPIFFE-ID §2.3: a trust domain name has at most 255 bytes, an ID 2048.
	maxTrustDomain = 255
	maxURI         = 2048
)

// ErrNotWorkload says that a SPIFFE ID has not the form of a workload's.
var ErrNotWorkload = errors.New("is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>")

// ID is the identity of a workload. The zero value means "no identity".
type ID struct{ h unique.Handle[record] }

type record struct {
	uri     string
	td, ns  int // offsets in uri just after the trust domain and the namespace
	present bool
}

// New builds the identity from its parts.
func New(trustDomain, namespace, serviceAccount string) (ID, error) {
	return Parse(scheme + trustDomain + "/ns/" + namespace + "/sa/" + serviceAccount)
}

// Parse accepts exactly spiffe://<trust domain>/ns/<namespace>/sa/<service account>.
func Parse(uri string) (ID, error) {
	if len(uri) > maxURI {
		return ID{}, fmt.Errorf("parse identity: %d bytes, at most %d are allowed", len(uri), maxURI)
	}
	id, err := spiffeid.FromString(uri)
	if err != nil {
		return ID{}, fmt.Errorf("parse identity %q: %w", uri, err)
	}
	return FromSPIFFE(id)
}

// MustParse is Parse for constants; it panics on an invalid one.
func MustParse(uri string) ID {
	id, err := Parse(uri)
	if err != nil {
		panic("BUG: " + err.Error())
	}
	return id
}

// FromSPIFFE converts a go-spiffe ID that names a workload.
func FromSPIFFE(id spiffeid.ID) (ID, error) {
	uri := id.String()
	td := len(scheme) + len(id.TrustDomain().Name())
	switch {
	case id.IsZero():
		return ID{}, errors.New("parse identity: it is empty")
	case len(uri) > maxURI:
		return ID{}, fmt.Errorf("parse identity: %d bytes, at most %d are allowed", len(uri), maxURI)
	case td-len(scheme) > maxTrustDomain:
		return ID{}, fmt.Errorf("parse identity: trust domain of %d bytes, at most %d are allowed", td-len(scheme), maxTrustDomain)
	}
	rest, ok := strings.CutPrefix(uri[td:], "/ns/")
	ns, sa, found := strings.Cut(rest, "/sa/")
	if !ok || !found || ns == "" || sa == "" || strings.Contains(ns, "/") || strings.Contains(sa, "/") {
		return ID{}, fmt.Errorf("parse identity %q: %w", uri, ErrNotWorkload)
	}
	r := record{uri: uri, td: td, ns: td + len("/ns/") + len(ns), present: true}
	return ID{unique.Make(r)}, nil
}

func (id ID) record() record {
	if id.IsZero() {
		return record{}
	}
	return id.h.Value()
}

// IsZero reports whether there is no identity.
func (id ID) IsZero() bool { return id == ID{} }

// String is the URI, "" for the zero value.
func (id ID) String() string { return id.record().uri }

// Principal is the URI without "spiffe://", as policies spell it.
func (id ID) Principal() string {
	if id.IsZero() {
		return ""
	}
	return id.h.Value().uri[len(scheme):]
}

// TrustDomain is the part of the URI after the scheme.
func (id ID) TrustDomain() string {
	r := id.record()
	if !r.present {
		return ""
	}
	return r.uri[len(scheme):r.td]
}

// Namespace is the Kubernetes namespace.
func (id ID) Namespace() string {
	r := id.record()
	if !r.present {
		return ""
	}
	return r.uri[r.td+len("/ns/") : r.ns]
}

// ServiceAccount is the Kubernetes service account.
func (id ID) ServiceAccount() string {
	r := id.record()
	if !r.present {
		return ""
	}
	return r.uri[r.ns+len("/sa/"):]
}

// URL is the identity as a URI SAN of a certificate, nil for the zero value.
func (id ID) URL() *url.URL {
	if id.IsZero() {
		return nil
	}
	r := id.h.Value()
	return &url.URL{Scheme: "spiffe", Host: r.uri[len(scheme):r.td], Path: r.uri[r.td:]}
}
