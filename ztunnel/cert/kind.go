package cert

import (
	"crypto/x509"
	"errors"
	"strings"
)

// Kind is the sort of fault that a certificate was refused for. The set is
// closed: it is a metric label.
type Kind string

const (
	KindInvalid     Kind = "invalid" // none at all, or no workload's
	KindExpired     Kind = "expired"
	KindNotYetValid Kind = "not_yet_valid"
	KindUnknownRoot Kind = "unknown_root"
	KindIdentity    Kind = "wrong_identity"
	KindRevoked     Kind = "revoked"
)

// Kind of the fault.
func (e *VerifyError) Kind() Kind {
	switch {
	case strings.HasPrefix(e.Reason, "expired"):
		return KindExpired
	case strings.HasPrefix(e.Reason, "not valid before"):
		return KindNotYetValid
	case strings.Contains(e.Reason, "revoked"):
		return KindRevoked
	case strings.HasPrefix(e.Reason, "wrong identity"):
		return KindIdentity
	case strings.HasPrefix(e.Reason, "no roots"):
		return KindUnknownRoot
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](e.Err); ok {
		return KindUnknownRoot
	}
	if inv, ok := errors.AsType[x509.CertificateInvalidError](e.Err); ok && inv.Reason == x509.Expired {
		return KindExpired // an intermediate's or a root's end
	}
	return KindInvalid
}
