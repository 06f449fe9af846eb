package flow

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"syscall"

	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/record"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// Reason is why a connection did not come to its own end. The set is closed:
// it is a metric label, a log field and what /refusals groups by.
type Reason string

const (
	ReasonNone Reason = "" // it did

	ReasonPolicy       Reason = "policy"        // the destination's authorization, there or here
	ReasonPolicyChange Reason = "policy_change" // the same, on a live connection

	ReasonCertExpired     Reason = "certificate_expired"
	ReasonCertNotYetValid Reason = "certificate_not_yet_valid"
	ReasonCertUnknownRoot Reason = "certificate_unknown_root"
	ReasonCertIdentity    Reason = "certificate_wrong_identity"
	ReasonCertRevoked     Reason = "certificate_revoked"
	ReasonCertInvalid     Reason = "certificate_invalid"
	ReasonCertRefused     Reason = "certificate_refused_by_peer" // ours, by the other side
	ReasonNoCertificate   Reason = "ca_unavailable"              // none of our own
	ReasonTLS             Reason = "tls_handshake"
	ReasonH2              Reason = "h2_handshake"

	ReasonHBONETimeout Reason = "hbone_timeout" // nobody answers at 15008: a NetworkPolicy?
	ReasonHBONERefused Reason = "hbone_refused" // nobody listens at 15008
	ReasonHBONEConnect Reason = "hbone_unreachable"

	ReasonNoEndpoint      Reason = "no_endpoint"
	ReasonUnknownWorkload Reason = "unknown_workload"
	ReasonSelfCall        Reason = "self_call"
	ReasonBadRequest      Reason = "bad_request"
	ReasonAppRefused      Reason = "application_refused"
	ReasonAppTimeout      Reason = "application_timeout"
	ReasonDstRefused      Reason = "destination_refused"
	ReasonDstTimeout      Reason = "destination_timeout"
	ReasonDstUnreachable  Reason = "destination_unreachable"
	ReasonConnectTimeout  Reason = "connect_timeout" // CONNECT has no answer
	ReasonConnect         Reason = "connect"         // CONNECT failed otherwise

	ReasonLimit      Reason = "limit" // one of our own bounds
	ReasonTunnelLost Reason = "tunnel_lost"
	ReasonStream     Reason = "stream_error"
	ReasonTimeout    Reason = "timeout" // a live connection's peer fell silent
	ReasonClientGone Reason = "client_gone"
	ReasonReset      Reason = "reset" // an end of a live connection reset it: no failure of ours
	ReasonDrain      Reason = "drain"
	ReasonPodGone    Reason = "pod_gone"
	ReasonOther      Reason = "other"
)

// flag is the reference's coarser name.
func (r Reason) flag() Flag {
	switch r {
	case ReasonPolicy, ReasonPolicyChange:
		return FlagDeny
	case ReasonCertRevoked:
		return FlagCertRevoked
	case ReasonCertExpired, ReasonCertNotYetValid, ReasonCertUnknownRoot, ReasonCertIdentity, ReasonCertInvalid, ReasonCertRefused, ReasonTLS:
		return FlagTLS
	case ReasonNoCertificate:
		return FlagIdentity
	case ReasonH2:
		return FlagH2
	case ReasonHBONETimeout:
		return FlagNetworkPolicy
	case ReasonHBONERefused, ReasonHBONEConnect, ReasonNoEndpoint, ReasonSelfCall, ReasonBadRequest, ReasonAppRefused, ReasonAppTimeout,
		ReasonDstRefused, ReasonDstTimeout, ReasonDstUnreachable, ReasonConnectTimeout, ReasonConnect, ReasonLimit:
		return FlagConnect
	}
	return FlagNone
}

// Failed gives err its reason, and with it its flag.
func Failed(r Reason, err error) error { return &FlagError{Flag: r.flag(), Reason: r, Err: err} }

// reasonOf is the reason of an error: what somebody said with Failed, else
// what its type tells, else what its flag tells.
func reasonOf(err error) Reason {
	if err == nil {
		return ReasonNone
	}
	f, flagged := errors.AsType[*FlagError](err)
	if flagged && f.Reason != "" {
		return f.Reason
	}
	if r := Classify(err); r != ReasonOther || !flagged {
		return r
	}
	switch f.Flag {
	case FlagDeny:
		return ReasonPolicy
	case FlagConnect:
		return ReasonConnect
	case FlagTLS:
		return ReasonTLS
	case FlagH2:
		return ReasonH2
	case FlagNetworkPolicy:
		return ReasonHBONETimeout
	case FlagIdentity:
		return ReasonNoCertificate
	case FlagCertRevoked:
		return ReasonCertRevoked
	}
	return ReasonOther
}

// ReasonOf is the reason that err was given, or else what its types say.
func ReasonOf(err error) Reason { return reasonOf(err) }

// Classify finds the reason in an error's types. It is one function for both
// sides, so that the same fault has one name wherever it is met.
func Classify(err error) Reason {
	if d, ok := errors.AsType[*DenyError](err); ok {
		if d.Live {
			return ReasonPolicyChange
		}
		return ReasonPolicy
	}
	switch {
	case errors.Is(err, ErrDrained):
		return ReasonDrain
	case errors.Is(err, ErrPodGone):
		return ReasonPodGone
	case errors.Is(err, hbone.ErrTooManyHandshakes):
		return ReasonLimit
	}
	if _, ok := errors.AsType[*ledger.ExhaustedError](err); ok {
		return ReasonLimit
	}
	if r := classifyCertificate(err); r != ReasonNone {
		return r
	}
	if s, ok := errors.AsType[*hbone.StatusError](err); ok {
		return classifyStatus(s.Code)
	}
	if d, ok := errors.AsType[*hbone.DialError](err); ok {
		return classifyDial(d)
	}
	if s, ok := errors.AsType[*hbone.ServeError](err); ok {
		switch s.Stage {
		case hbone.StageTLS:
			return ReasonTLS
		case hbone.StageH2:
			return ReasonH2
		}
	}
	if r, ok := errors.AsType[*relay.Error](err); ok {
		return classifyRelay(r.Err)
	}
	if errors.Is(err, context.Canceled) {
		return ReasonClientGone
	}
	return ReasonOther
}

func classifyCertificate(err error) Reason {
	if _, ok := errors.AsType[*cert.UnavailableError](err); ok {
		return ReasonNoCertificate
	}
	if _, ok := errors.AsType[*cert.RevokedError](err); ok {
		return ReasonCertRevoked
	}
	v, ok := errors.AsType[*cert.VerifyError](err)
	switch {
	case !ok && PeerAlert(err) != "":
		return ReasonCertRefused
	case !ok:
		return ReasonNone
	}
	switch v.Kind() {
	case cert.KindExpired:
		return ReasonCertExpired
	case cert.KindNotYetValid:
		return ReasonCertNotYetValid
	case cert.KindUnknownRoot:
		return ReasonCertUnknownRoot
	case cert.KindIdentity:
		return ReasonCertIdentity
	case cert.KindRevoked:
		return ReasonCertRevoked
	}
	return ReasonCertInvalid
}

// certificateAlert reports the alerts with which a peer refuses our certificate
// (https://www.rfc-editor.org/rfc/rfc8446#section-6.2): bad_certificate to
// certificate_unknown, unknown_ca, access_denied, certificate_required.
func certificateAlert(code uint8) bool {
	return code >= 42 && code <= 46 || code == 48 || code == 49 || code == 116
}

// PeerAlert is the TLS alert with which the other side refused our
// certificate, "" if it did not. In TLS 1.3 a client learns of it only after
// its own handshake, so it may come at any later stage.
func PeerAlert(err error) string {
	if r, ok := errors.AsType[*record.Error](err); ok {
		if r.Remote && certificateAlert(uint8(r.Alert)) {
			return tls.AlertError(r.Alert).Error()
		}
		return ""
	}
	// crypto/tls wraps an alert that it received in a net.OpError of this name.
	for o, ok := errors.AsType[*net.OpError](err); ok; o, ok = errors.AsType[*net.OpError](o.Err) {
		if o.Op != "remote error" {
			continue
		}
		for code := range uint8(128) {
			if text := tls.AlertError(code).Error(); certificateAlert(code) && o.Err.Error() == text {
				return text
			}
		}
	}
	return ""
}

func classifyStatus(code int) Reason {
	switch {
	case code == 401 || code == 403:
		return ReasonPolicy
	case code == 503:
		return ReasonAppRefused
	case code >= 400 && code < 500:
		return ReasonBadRequest
	}
	return ReasonConnect
}

func classifyDial(d *hbone.DialError) Reason {
	switch {
	case d.Stage == hbone.StageTCP && d.Timeout():
		return ReasonHBONETimeout
	case d.Stage == hbone.StageTCP && errors.Is(d.Err, syscall.ECONNREFUSED):
		return ReasonHBONERefused
	case d.Stage == hbone.StageTCP:
		return ReasonHBONEConnect
	case d.Stage == hbone.StageTLS:
		return ReasonTLS
	case d.Stage == hbone.StageH2:
		return ReasonH2
	case d.Stage == hbone.StageLocal && errors.Is(d.Err, context.Canceled):
		return ReasonClientGone
	case d.Stage == hbone.StageLocal:
		return ReasonLimit
	case d.Timeout():
		return ReasonConnectTimeout
	}
	return ReasonConnect
}

// classifyRelay: a TCP reset, and RST_STREAM with the codes that stand for
// one, is how an end of the connection chose to end it.
func classifyRelay(err error) Reason {
	errno, isErrno := errors.AsType[syscall.Errno](err)
	if errors.Is(err, os.ErrDeadlineExceeded) || isErrno && errno.Timeout() {
		return ReasonTimeout // keepalive or retransmission gave up
	}
	if r, ok := errors.AsType[*hbone.ResetError](err); ok {
		switch r.Code {
		case hbone.CodeCancel, hbone.CodeConnect, hbone.CodeNo:
			return ReasonReset
		}
		return ReasonStream
	}
	if o, ok := errors.AsType[*net.OpError](err); ok && o.Net == "hbone" {
		return ReasonTunnelLost // whatever ended the tunnel, its streams did not
	}
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return ReasonReset
	}
	return ReasonOther
}

// DialFailed gives the failure to open a plain connection its reason; app is
// whether it leads to the pod's own application.
func DialFailed(app bool, err error) error {
	refused, timeout, other := ReasonDstRefused, ReasonDstTimeout, ReasonDstUnreachable
	if app {
		refused, timeout, other = ReasonAppRefused, ReasonAppTimeout, ReasonAppRefused
	}
	ne, isNet := errors.AsType[net.Error](err)
	switch {
	case errors.Is(err, context.Canceled):
		return Failed(ReasonClientGone, err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return Failed(refused, err)
	case isNet && ne.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return Failed(timeout, err)
	}
	if _, ok := errors.AsType[*ledger.ExhaustedError](err); ok {
		return Failed(ReasonLimit, err)
	}
	return Failed(other, err)
}
