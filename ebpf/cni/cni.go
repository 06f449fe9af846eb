// Package cni is the chained CNI plugin: it lets a pod of the mesh start only when
// everything that the pod sends and receives is redirected.
//
//	kubelet ─▶ runtime ─▶ bridge, ipam ... ─▶ ambit-cni ─ socket ─▶ agent ─▶ kernel, ztunnel
//	                                              │
//	                                              └─ no agent: last known facts
//
// The plugin changes nothing itself and has no access to Kubernetes. It passes the
// result of the plugins before it on, byte for byte, and asks the agent:
//
//   - a pod that is not in the mesh starts at once;
//   - one that is starts when the kernel captures its connections and ztunnel has
//     acknowledged it, or its start fails with what is missing and the runtime tries
//     again.
//
// While no agent answers, or none that knows the pods, after a reboot above all, the facts that it left on the
// disk decide (attach.Facts). In doubt the pod waits. Pods of excluded namespaces
// never do: the agent and ztunnel must be able to start. What nobody can know
// without the agent is the label of a pod that was made meanwhile: in a namespace
// outside the mesh, whose other pods have no such label either, it starts without
// the mesh, and joins it when the agent comes, as running pods do.
//
// Each call is a process of its own and owns everything it has.
package cni

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
)

const (
	// retryInterval is how soon an agent that has just started is found.
	retryInterval = 250 * time.Millisecond
	// shortTimeout is for calls that nothing waits for and that have to succeed.
	shortTimeout = 5 * time.Second
	// tellTimeout is for an agent that hangs, which excluded pods must not wait for.
	tellTimeout = 500 * time.Millisecond

	// codeNotAvailable is what the specification has STATUS say.
	codeNotAvailable = 50
	// codeRefused is in the range of codes that plugins may define.
	codeRefused = 100
)

// Versions are those of the specification that the plugin speaks. Older ones do not
// know chains.
func Versions() version.PluginInfo {
	return version.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
}

// Plugin answers the operations of the specification.
type Plugin struct {
	Stdout io.Writer
	// Dial replaces the agent's socket in tests.
	Dial func(ctx context.Context) (net.Conn, error)
}

// Funcs are the operations as package skel calls them.
func (p *Plugin) Funcs(ctx context.Context) skel.CNIFuncs {
	with := func(f func(context.Context, *skel.CmdArgs) error) func(*skel.CmdArgs) error {
		return func(args *skel.CmdArgs) error { return f(ctx, args) }
	}
	return skel.CNIFuncs{Add: with(p.Add), Del: with(p.Del), Check: with(p.Check), Status: with(p.Status), GC: with(p.GC)}
}

func (p *Plugin) client(c *call) attach.Client { return attach.Client{Path: c.Socket, Dial: p.Dial} }

// Add returns when the pod may start.
func (p *Plugin) Add(ctx context.Context, args *skel.CmdArgs) error {
	c, err := parseCall(args.StdinData)
	if err != nil {
		return err
	}
	if !c.hasResult() {
		return types.NewError(types.ErrInvalidNetworkConfig, "network "+c.Name+" calls "+Type+" first: there is no prevResult",
			Type+" gives pods no addresses: put its entry behind the plugin that does")
	}
	if err := p.admit(ctx, attach.Add, c, args); err != nil {
		return err
	}
	if _, err := p.Stdout.Write(c.PrevResult); err != nil {
		return types.NewError(types.ErrIOFailure, "write the result: "+err.Error(), "")
	}
	return nil
}

// Check reports a pod that is not redirected as it should be.
func (p *Plugin) Check(ctx context.Context, args *skel.CmdArgs) error {
	c, err := parseCall(args.StdinData)
	if err != nil {
		return err
	}
	c.TimeoutSeconds = min(c.TimeoutSeconds, int(shortTimeout/time.Second)) // nothing is about to happen that could be waited for
	return p.admit(ctx, attach.Check, c, args)
}

func (p *Plugin) admit(ctx context.Context, command attach.Command, c *call, args *skel.CmdArgs) error {
	a, ok := attachment(c, args)
	if !ok {
		return nil
	}
	if c.hasResult() {
		var err error
		if a.Addrs, err = addresses(c.CNIVersion, c.PrevResult); err != nil {
			return types.NewError(types.ErrDecodingFailure, "read prevResult of network "+c.Name+": "+err.Error(), "")
		}
	}
	if slices.Contains(c.ExcludeNamespaces, a.Namespace) {
		p.tell(ctx, c, a)
		return nil
	}
	// The clock says when time is up: ctx says so a little later, and in between one
	// would ask once more, to hear of nothing but that.
	end := time.Now().Add(c.timeout())
	ctx, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	late := func() bool { return ctx.Err() != nil || !time.Now().Before(end) }
	var waiting error
	for {
		_, err := p.client(c).Ask(ctx, attach.Request{Command: command, Attachment: a})
		if err == nil {
			return nil
		}
		if late() && waiting != nil {
			return waiting // this time it was too late to learn more
		}
		refusal, refused := errors.AsType[*attach.Refusal](err)
		switch {
		case refused && refusal.Final:
			return types.NewError(codeRefused, refusal.Message, refusal.Details)
		case refused && !refusal.Unready:
			return types.NewError(types.ErrTryAgainLater, refusal.Message, refusal.Details)
		case !refused && !errors.Is(err, attach.ErrAway):
			return types.NewError(types.ErrInternal, err.Error(), "")
		}
		pass, why := alone(c, a)
		switch {
		case pass:
			return nil
		case refused:
			waiting = types.NewError(types.ErrTryAgainLater, refusal.Message, refusal.Details+"; "+why)
		default:
			waiting = types.NewError(types.ErrTryAgainLater,
				fmt.Sprintf("pod %s waits for the mesh's node agent, which does not answer on %s: %s", a.Pod(), c.Socket, why),
				fmt.Sprintf("is ambit-node running on this node? The pod starts by itself once it is (%v)", err))
		}
		select {
		case <-time.After(retryInterval):
		case <-ctx.Done():
		}
		if late() {
			return waiting
		}
	}
}

// tell lets the agent know where a pod is that does not wait for it. Should the pod be
// in the mesh all the same, the agent finds it.
func (p *Plugin) tell(ctx context.Context, c *call, a attach.Attachment) {
	ctx, cancel := context.WithTimeout(ctx, tellTimeout)
	defer cancel()
	_, _ = p.client(c).Ask(ctx, attach.Request{Command: attach.Tell, Attachment: a})
}

// alone decides about a pod without the agent.
func alone(c *call, a attach.Attachment) (pass bool, why string) {
	facts, err := attach.ReadFacts(c.StateDir)
	if err != nil {
		return false, err.Error()
	}
	return facts.Decide(a.Namespace, a.UID)
}

// Del makes the agent forget the pod's attachment. It always succeeds: an agent that
// does not hear of it finds out that the namespace is gone.
func (p *Plugin) Del(ctx context.Context, args *skel.CmdArgs) error {
	c, err := parseCall(args.StdinData)
	if err != nil {
		return nil // nothing was made that could stay behind
	}
	ctx, cancel := context.WithTimeout(ctx, shortTimeout)
	defer cancel()
	a, _ := attachment(c, args)
	_, _ = p.client(c).Ask(ctx, attach.Request{Command: attach.Del, Attachment: a})
	return nil
}

// GC makes the agent forget attachments of the network that are not valid any more.
func (p *Plugin) GC(ctx context.Context, args *skel.CmdArgs) error {
	c, err := parseCall(args.StdinData)
	if err != nil {
		return err
	}
	if c.Valid == nil {
		return nil // the runtime did not say which are
	}
	ctx, cancel := context.WithTimeout(ctx, shortTimeout)
	defer cancel()
	r := attach.Request{Command: attach.GC, Attachment: attach.Attachment{Network: c.Name}}
	for _, v := range c.Valid {
		r.Valid = append(r.Valid, v.ContainerID)
	}
	if _, err := p.client(c).Ask(ctx, r); err != nil && !errors.Is(err, attach.ErrAway) {
		return types.NewError(types.ErrInternal, "collect attachments: "+err.Error(), "")
	}
	return nil
}

// Status reports whether Add can do its work. A runtime that hears that it cannot
// calls the whole node's network not ready: kubelet starts no pod any more, not even
// the agent's, and after a while the running ones count as failed. So an agent that
// is away, for an upgrade perhaps, is no reason: pods outside the mesh still start,
// and the others are told one by one. With strictStatus it is one.
func (p *Plugin) Status(ctx context.Context, args *skel.CmdArgs) error {
	c, err := parseCall(args.StdinData)
	if err != nil {
		return err
	}
	if !c.StrictStatus {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, shortTimeout)
	defer cancel()
	if _, err := p.client(c).Ask(ctx, attach.Request{Command: attach.Status}); err != nil {
		return types.NewError(codeNotAvailable, "pods of the mesh cannot start on this node: "+err.Error(),
			"is ambit-node running and ready on this node? strictStatus is set, so that others do not start either")
	}
	return nil
}
