package ca

import (
	"fmt"
	"slices"

	"github.com/ambit-mesh/ambit/xds/identity"
)

// DefaultNodeAccounts may ask for the identities of pods on their own node:
// our node proxy, and Istio's in its own namespace.
var DefaultNodeAccounts = []string{"ambit-system/ztunnel", "istio-system/ztunnel"}

// Pods knows the pods that exist now.
type Pods interface {
	// Pod returns the uid and node of a pod; ok is false for one that is unknown
	// or has ended.
	Pod(namespace, name string) (uid, node string, ok bool)
}

// NodeRule decides which identity a caller may have. It bounds what a taken
// node can do: a node proxy gets only the identities of pods beside it.
type NodeRule struct {
	TrustDomain string
	// Accounts are the "namespace/serviceaccount" that may impersonate.
	Accounts  []string
	Placement Placement
	// Pods is asked for the caller's own pod: it must exist with the token's uid
	// and node, so that a token dies with its pod.
	Pods Pods
}

// Identity returns what the caller may have: itself when impersonate is empty,
// else that identity if it is its node's. Errors are *DeniedError or
// *InvalidError.
func (r *NodeRule) Identity(c Caller, impersonate string) (identity.ID, error) {
	if err := r.checkPod(c); err != nil {
		return identity.ID{}, err
	}
	if impersonate == "" {
		id, err := identity.New(r.TrustDomain, c.Namespace, c.ServiceAccount)
		if err != nil {
			return identity.ID{}, &InvalidError{err.Error()}
		}
		return id, nil
	}
	id, err := identity.Parse(impersonate)
	if err != nil {
		return identity.ID{}, &InvalidError{"ImpersonatedIdentity: " + err.Error()}
	}
	switch {
	case !slices.Contains(r.Accounts, c.Account()):
		return identity.ID{}, &DeniedError{c, fmt.Sprintf("may not ask for %s: %s is not a trusted node account (--trusted-node-accounts)", id, c.Account())}
	case c.PodName == "" || c.PodUID == "" || c.Node == "":
		return identity.ID{}, &DeniedError{c, fmt.Sprintf("may not ask for %s: the token is not bound to a pod and a node; use a projected token, or ambitd token --node --pod --uid", id)}
	case id.TrustDomain() != r.TrustDomain:
		return identity.ID{}, &DeniedError{c, fmt.Sprintf("may not ask for %s: the trust domain of this mesh is %s", id, r.TrustDomain)}
	case !r.Placement.RunsOn(c.Node, id):
		return identity.ID{}, &DeniedError{c, fmt.Sprintf("may not ask for %s: no running pod with service account %s/%s is on node %s", id, id.Namespace(), id.ServiceAccount(), c.Node)}
	}
	return id, nil
}

func (r *NodeRule) checkPod(c Caller) error {
	if c.PodName == "" {
		return nil // bound to an account only: it can only ask for itself
	}
	uid, node, ok := r.Pods.Pod(c.Namespace, c.PodName)
	switch {
	case !ok:
		return &DeniedError{c, fmt.Sprintf("the token is of pod %s/%s, which does not run: its Pod must be in the source, with uid %s, for its token to count", c.Namespace, c.PodName, c.PodUID)}
	case uid != c.PodUID:
		return &DeniedError{c, fmt.Sprintf("the token is of pod uid %s, but %s/%s now has uid %s: the pod was replaced, use its own token", c.PodUID, c.Namespace, c.PodName, uid)}
	case c.Node != "" && node != c.Node:
		return &DeniedError{c, fmt.Sprintf("the token is of node %s, but pod %s/%s runs on node %s", c.Node, c.Namespace, c.PodName, node)}
	}
	return nil
}
