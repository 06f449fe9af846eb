package derive

import (
	"fmt"
	"maps"
	"slices"

	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/crd"
)

const (
	// StrictPolicy is the name of the policy, in the root namespace, that denies
	// connections without an identity. A STRICT workload refers to it.
	StrictPolicy = "istio_converted_static_strict"
	// A PeerAuthentication with modes per port becomes a policy of this name.
	portPolicyPrefix = "converted_peer_authentication_"
)

// strictPolicy refuses plaintext on every port.
func strictPolicy(root string) *security.Authorization {
	return plaintextPolicy(nn{root, StrictPolicy}, &security.Match{})
}

// plaintextPolicy denies peers without an identity where m matches.
func plaintextPolicy(name nn, m *security.Match) *security.Authorization {
	m.NotPrincipals = []*security.StringMatch{present()}
	return &security.Authorization{
		Namespace: name.ns, Name: name.name,
		Scope: security.Scope_WORKLOAD_SELECTOR, Action: security.Action_DENY,
		Rules: []*security.Rule{{Clauses: []*security.Clause{{Matches: []*security.Match{m}}}}},
	}
}

// portPolicy is the policy of a PeerAuthentication whose ports differ from its
// own or inherited mode, nil when they do not.
func portPolicy(p *crd.PeerAuthentication, inherited crd.MTLSMode) *security.Authorization {
	strict := effective(p.Spec.MTLS.EffectiveMode(), inherited) == crd.ModeStrict
	var differ []uint32
	for port, m := range p.Spec.PortLevelMTLS {
		mode := m.EffectiveMode()
		if mode != crd.ModeUnset && (mode == crd.ModeStrict) != strict {
			differ = append(differ, port)
		}
	}
	if len(differ) == 0 {
		return nil
	}
	slices.Sort(differ)
	m := &security.Match{DestinationPorts: differ}
	if strict {
		m = &security.Match{NotDestinationPorts: differ}
	}
	return plaintextPolicy(nn{p.Namespace, portPolicyPrefix + p.Name}, m)
}

// effective resolves inheritance: the narrower level wins where it says something.
func effective(mode, inherited crd.MTLSMode) crd.MTLSMode {
	if mode == crd.ModeUnset {
		return inherited
	}
	return mode
}

// older orders policies of one level: the oldest is in force. Without times, as
// in plain files, the name decides.
func older(a, b *crd.PeerAuthentication) bool {
	if !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
		return a.CreationTimestamp.Before(&b.CreationTimestamp)
	}
	return a.Name < b.Name || a.Name == b.Name && a.Namespace < b.Namespace
}

// oldest is the policy in force among those without a selector in namespaces.
func (e *Engine) oldest(namespaces ...string) *crd.PeerAuthentication {
	var best *crd.PeerAuthentication
	for _, ns := range namespaces {
		for _, p := range e.wide[ns] {
			if best == nil || older(p, best) {
				best = p
			}
		}
	}
	return best
}

// inheritedMode is the mode of a workload that no selector chooses.
func (e *Engine) inheritedMode(ns string) crd.MTLSMode {
	mode, _ := e.inherited(ns)
	return mode
}

// modeFrom is a mode and the name of the PeerAuthentication that sets it.
type modeFrom struct {
	mode crd.MTLSMode
	name nn
}

func (e *Engine) inheritedFrom(ns string) modeFrom {
	mode, by := e.inherited(ns)
	if by == nil {
		return modeFrom{mode: mode}
	}
	return modeFrom{mode, nn{by.Namespace, by.Name}}
}

// inherited is inheritedMode, and who says so: nil for nobody.
func (e *Engine) inherited(ns string) (mode crd.MTLSMode, by *crd.PeerAuthentication) {
	mode = crd.ModePermissive
	levels := [][]string{e.set.roots}
	if !e.set.isRoot(ns) {
		levels = append(levels, []string{ns})
	}
	for _, level := range levels {
		if p := e.oldest(level...); p != nil && p.Spec.MTLS.EffectiveMode() != crd.ModeUnset {
			mode, by = p.Spec.MTLS.EffectiveMode(), p
		}
	}
	return mode, by
}

// peerPolicy is the policy that a workload's mTLS mode makes it refer to, "" for none.
func (e *Engine) peerPolicy(ns string, labels map[string]string) string {
	policy, _ := e.peerPolicyBy(ns, labels)
	return policy
}

// strictBy is the PeerAuthentication that makes a workload refuse plaintext on
// every port, "" for none.
func (e *Engine) strictBy(ns string, labels map[string]string) string {
	policy, by := e.peerPolicyBy(ns, labels)
	if by == nil || policy != e.set.roots[0]+"/"+StrictPolicy {
		return ""
	}
	return by.Namespace + "/" + by.Name
}

// peerPolicyBy is peerPolicy, and whose mode it is.
func (e *Engine) peerPolicyBy(ns string, labels map[string]string) (policy string, by *crd.PeerAuthentication) {
	inherited, by := e.inherited(ns)
	var own *crd.PeerAuthentication
	if !e.set.isRoot(ns) { // a selector in the root namespace is ignored, as in Istio
		e.peerSelectors.choosing(ns, labels, func(p nn) {
			if pa := e.peers[p]; own == nil || older(pa, own) {
				own = pa
			}
		})
	}
	if own != nil {
		if a := portPolicy(own, inherited); a != nil {
			return a.Namespace + "/" + a.Name, own
		}
		if mode := own.Spec.MTLS.EffectiveMode(); mode != crd.ModeUnset {
			inherited, by = mode, own
		}
	}
	if inherited == crd.ModeStrict {
		return e.set.roots[0] + "/" + StrictPolicy, by
	}
	return "", nil
}

// peerVerdict is what becomes of one PeerAuthentication.
func (e *Engine) peerVerdict(k nn) verdict {
	p := e.peers[k]
	v := verdict{reason: ReasonAccepted}
	selects := len(p.Spec.Selector.Labels()) > 0
	if selects && e.set.isRoot(k.ns) {
		v.reason = ReasonUnsupported
		v.notes = append(v.notes, "a selector in the root namespace is ignored: put the policy into the workload's namespace")
		return v
	}
	if selects {
		v.authz = portPolicy(p, e.inheritedMode(k.ns))
	} else {
		level := []string{k.ns}
		if e.set.isRoot(k.ns) {
			level = e.set.roots
		}
		if first := e.oldest(level...); first != p {
			v.reason = ReasonConflict
			v.notes = append(v.notes, fmt.Sprintf("%s/%s is older and in force", first.Namespace, first.Name))
		}
	}
	if p.Spec.MTLS.EffectiveMode() == crd.ModeDisable {
		v.unsupported()
		v.notes = append(v.notes, "DISABLE acts as PERMISSIVE: HBONE cannot be turned off")
	}
	for _, port := range slices.Sorted(maps.Keys(p.Spec.PortLevelMTLS)) {
		if p.Spec.PortLevelMTLS[port].EffectiveMode() == crd.ModeDisable {
			v.unsupported()
			v.notes = append(v.notes, fmt.Sprintf("DISABLE on port %d acts as PERMISSIVE: HBONE cannot be turned off", port))
		}
	}
	return v
}
