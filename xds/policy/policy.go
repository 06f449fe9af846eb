// Package policy compiles layer 4 authorization policies and decides whether
// a connection may go on, and why.
//
//	wire message → Compile → Txn.Put → Commit → *Set → Authorize → Verdict
//
// A Set is immutable, any goroutine may use it, and a change shares structure
// with the Set before. Deciding does not allocate, and its cost does not grow
// with the number of policies: rules are found through an index by what they
// demand of the peer, the source address and the port, and only those that can
// match are evaluated.
//
// A term that cannot be understood never widens a policy: it makes a DENY
// match more and an ALLOW match less, and is reported as a Problem. A policy
// that a workload names but that is not known denies.
//
// The package does no I/O and reads no clock.
package policy

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// Action is what a matching policy does.
type Action uint8

// The actions, numbered as on the wire.
const (
	Allow Action = iota
	Deny
)

// String is the action's name.
func (a Action) String() string {
	if a == Deny {
		return "DENY"
	}
	return "ALLOW"
}

// Scope is where a policy counts.
type Scope uint8

// The scopes, numbered as on the wire.
const (
	Global    Scope = iota // every workload
	Namespace              // workloads of the policy's namespace
	Selector               // workloads that name the policy
)

// String is the scope's name.
func (s Scope) String() string {
	switch s {
	case Global:
		return "GLOBAL"
	case Namespace:
		return "NAMESPACE"
	}
	return "WORKLOAD_SELECTOR"
}

// Conn is what is known of a connection. Dst has the port of the application.
type Conn struct {
	Peer identity.ID // zero: plaintext, or a client without identity
	Src  netip.AddrPort
	Dst  netip.AddrPort
}

// Policy is a compiled policy; it is immutable.
type Policy struct {
	Key             string // "namespace/name"
	Namespace, Name string
	Scope           Scope
	Action          Action
	DryRun          bool
	Problems        []Problem
	Source          *security.Authorization // as received, for showing; never changed

	rules []rule
	own   *index   // of rules, when there are many
	dry   []string // per rule, the sentence of a dry run
}

// Rules is the number of rules.
func (p *Policy) Rules() int { return len(p.rules) }

// AppliesTo reports whether the policy counts for a workload of namespace ns
// that names refs.
func (p *Policy) AppliesTo(ns string, refs []string) bool {
	if p.Scope == Global || p.Scope == Namespace && p.Namespace == ns {
		return true
	}
	for _, r := range refs {
		if r == p.Key {
			return true
		}
	}
	return false
}

// Problem is a term that could not be understood.
type Problem struct {
	Policy  string // "namespace/name"
	Rule    int    // 1-based, 0 when it is about the policy as a whole
	Field   string
	Message string
	// Rejected: the policy is not in force at all; the version before stays.
	Rejected bool
}

// Error is the problem in one sentence.
func (p Problem) Error() string {
	if p.Rule == 0 {
		return fmt.Sprintf("policy %s: %s: %s", p.Policy, p.Field, p.Message)
	}
	return fmt.Sprintf("policy %s rule %d: %s: %s", p.Policy, p.Rule, p.Field, p.Message)
}

type reason uint8

const (
	noAllowPolicies reason = iota // nothing restricts the workload
	matched                       // Policy and Rule decided
	noneMatched                   // ALLOW policies exist, none matched
	unknownPolicy                 // Policy is named by the workload and not known
)

// Verdict is a decision with its cause.
type Verdict struct {
	Allowed bool
	Policy  string // "namespace/name" of the policy that decided, if one did
	Rule    int    // 1-based, 0 is none
	// DryRun says what policies in dry run would have done, "" if nothing.
	DryRun string
	// StrictBy is the PeerAuthentication that made the workload STRICT,
	// "namespace/name", for whoever knows the workload to set.
	StrictBy string

	why       reason
	plaintext bool
	ns        string
	allows    int              // ALLOW policies considered
	names     [maxNames]string // the first of them, when none matched
}

// Policies that the control plane makes from PeerAuthentication.
const (
	strictPolicy     = "istio_converted_static_strict"
	strictPortPolicy = "converted_peer_authentication_"
)

// Why is the cause in a stable sentence.
func (v Verdict) Why() string {
	switch v.why {
	case matched:
		if author, strict := v.strict(); strict && !v.Allowed && v.plaintext {
			if author != "" {
				author = "PeerAuthentication " + author + ", "
			}
			return "STRICT: plaintext from a client outside the mesh (" + author + "policy " + v.Policy + ")"
		}
		return fmt.Sprintf("policy %s rule %d", v.Policy, v.Rule)
	case noneMatched:
		return fmt.Sprintf("no ALLOW policy of namespace %s matched (%s)", v.ns, v.allowed())
	case unknownPolicy:
		return "policy " + v.Policy + " not yet known"
	}
	return "no ALLOW policy applies"
}

// strict reports whether the policy that decided is one that the control plane
// made from a PeerAuthentication, and from which, if that is known.
func (v Verdict) strict() (author string, strict bool) {
	ns, name, _ := strings.Cut(v.Policy, "/")
	if name == strictPolicy {
		return v.StrictBy, true
	}
	if own, ok := strings.CutPrefix(name, strictPortPolicy); ok {
		return ns + "/" + own, true
	}
	return "", false
}

// allowed counts the ALLOW policies that were considered, and names some.
func (v Verdict) allowed() string {
	var b strings.Builder
	if v.allows == 1 {
		b.WriteString("1 policy: ")
	} else {
		fmt.Fprintf(&b, "%d policies: ", v.allows)
	}
	named := 0
	for _, name := range v.names {
		if name == "" {
			break
		}
		if named++; named > 1 {
			b.WriteString(", ")
		}
		b.WriteString(name)
	}
	if more := v.allows - named; more > 0 {
		fmt.Fprintf(&b, " and %d more", more)
	}
	return b.String()
}
