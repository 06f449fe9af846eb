package outbound

import (
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
)

// explain says who refused a connection and why, with the reason that the log,
// the metrics and /refusals know. The texts are stable: runbooks quote them.
func explain(err error, plan Plan) error {
	if err == nil {
		return nil
	}
	if n, ok := errors.AsType[*neighbourError](err); ok {
		return DeniedThere(n.err) // it has said why
	}
	if f, ok := errors.AsType[*flow.FlagError](err); ok && f.Reason != "" {
		return err // who failed said so: the same node's other side, without a tunnel between
	}
	if _, ok := errors.AsType[*ResolveError](err); ok {
		return flow.Failed(flow.ReasonNoEndpoint, err)
	}
	r := flow.Classify(err)
	switch {
	case r == flow.ReasonOther && plan.Transport != flow.HBONE:
		return flow.DialFailed(false, err)
	case r == flow.ReasonOther:
		r = flow.ReasonConnect
	}
	return flow.Failed(r, sentence(r, err, plan))
}

// sentence puts who it was, and what to look at, in front of what happened.
func sentence(r flow.Reason, err error, plan Plan) error {
	if e, ok := errors.AsType[*hbone.ResetError](err); ok && e.Remote && e.Code == hbone.CodeRefusedStream {
		return fmt.Errorf("refused by peer %s (REFUSED_STREAM): its node is full or draining (see %s there): %w", plan.Addr, hbone.RefusedStreamsMetric, err)
	}
	switch r {
	case flow.ReasonPolicy:
		if _, here := errors.AsType[*flow.DenyError](err); here {
			return err // it names the policy
		}
		return fmt.Errorf("denied by destination's policy: %s refused %s: %w", plan.Addr, plan.Authority, err)
	case flow.ReasonAppRefused:
		return fmt.Errorf("%s could not reach %s (does the application listen there?): %w", plan.Addr, plan.Authority, err)
	case flow.ReasonBadRequest:
		return fmt.Errorf("%s refused %s: %w", plan.Addr, plan.Authority, err)
	case flow.ReasonCertExpired, flow.ReasonCertNotYetValid, flow.ReasonCertUnknownRoot, flow.ReasonCertIdentity, flow.ReasonCertInvalid, flow.ReasonCertRevoked:
		return fmt.Errorf("certificate of destination not accepted: %w", err)
	case flow.ReasonCertRefused:
		return fmt.Errorf("destination did not accept the certificate of this side (%s): %w", flow.PeerAlert(err), err)
	case flow.ReasonNoCertificate:
		u, _ := errors.AsType[*cert.UnavailableError](err)
		return u // it names the identity and since when; where the tunnel would lead does not matter
	case flow.ReasonHBONERefused:
		return fmt.Errorf("nobody listens for HBONE at %s (is the destination still enrolled, its node's ztunnel running?): %w", plan.Addr, err)
	case flow.ReasonTLS:
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			// What a node proxy does that has no certificate for the pod, or does not know it.
			return fmt.Errorf("%s ended the handshake without a word (its ztunnel's log says why): %w", plan.Addr, err)
		}
	case flow.ReasonLimit:
		return fmt.Errorf("bound of this node reached: %w", err)
	}
	return err
}

// nowhere gives a plan that could not be made its reason.
func nowhere(err error) error {
	if errors.Is(err, ErrSelfCall) {
		return flow.Failed(flow.ReasonSelfCall, err)
	}
	return flow.Failed(flow.ReasonNoEndpoint, err)
}
