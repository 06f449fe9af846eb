package app

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/inpod"
	"github.com/ambit-mesh/ambit/ztunnel/outbound"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
	"github.com/ambit-mesh/ambit/ztunnel/socks"
)

// socks serves one workload's SOCKS port.
func (n *node) socks(p handoff.Pod, out *outbound.Proxy, self func(context.Context) (*mesh.Workload, error)) inpod.Handler {
	srv := socks.New(socks.Config{
		Resolve: func(ctx context.Context, host string) (netip.Addr, error) {
			w, err := self(ctx)
			if err != nil {
				return netip.Addr{}, err
			}
			return n.resolve(ctx, w, host)
		},
		Connect: func(ctx context.Context, c net.Conn, dst netip.AddrPort, opened func(error) error) {
			out.ServeTo(ctx, c.(sockopt.Socket), dst, opened)
		},
		Refused: func(c net.Conn, r socks.Request, err error) {
			n.flow.Refuse(flow.Record{Direction: flow.Outbound, Pod: p.UID, Src: n.lookup(p), SrcAddr: addrPortOf(c.RemoteAddr()),
				DstAddr: netip.AddrPortFrom(r.Addr, r.Port)}, flow.Failed(flow.ReasonBadRequest, err))
		},
		Code: socksCode,
	})
	return inpod.Blocking(func(ctx context.Context, c sockopt.Socket) { srv.Serve(ctx, c) })
}

// resolve finds what a name means to a workload: a service of the mesh under
// any of the names that Kubernetes lets one write, or else what DNS says.
func (n *node) resolve(ctx context.Context, w *mesh.Workload, host string) (netip.Addr, error) {
	m := n.store.View().Mesh
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	for _, name := range []string{host, host + "." + w.Namespace + ".svc." + n.cfg.ClusterDomain, host + ".svc." + n.cfg.ClusterDomain, host + "." + n.cfg.ClusterDomain} {
		svc := m.ServiceByHostname(name, w.Namespace)
		if svc == nil {
			continue
		}
		if a := reachable(m, svc, w); a.IsValid() {
			return a, nil
		}
		return netip.Addr{}, fmt.Errorf("service %s has no address in network %q", svc.Host, w.Network)
	}
	return n.names.Resolve(ctx, w, host, false)
}

// reachable is an address by which w reaches a service: a VIP of its network,
// IPv4 first, or of a headless one an endpoint's.
func reachable(m *mesh.Snapshot, svc *mesh.Service, w *mesh.Workload) (best netip.Addr) {
	consider := func(a netip.Addr) {
		if !best.IsValid() || a.Is4() && !best.Is4() {
			best = a
		}
	}
	for _, v := range svc.VIPs {
		if v.Network == w.Network {
			consider(v.Addr)
		}
	}
	if best.IsValid() || len(svc.VIPs) > 0 {
		return best
	}
	set := m.Endpoints(svc.Host)
	for i := range set.Len() {
		if e := set.At(i).Workload; e.Network == w.Network && (e.Healthy || svc.AllowUnhealthy) {
			for _, a := range e.Addrs {
				consider(a)
			}
		}
	}
	return best
}

// socksCode says why there is no way to the destination.
func socksCode(err error) socks.Code {
	switch {
	case errors.Is(err, syscall.ENETUNREACH):
		return socks.NetworkUnreachable
	case errors.Is(err, syscall.EHOSTUNREACH):
		return socks.HostUnreachable
	}
	switch flow.ReasonOf(err) {
	case flow.ReasonPolicy, flow.ReasonPolicyChange, flow.ReasonSelfCall:
		return socks.NotAllowed
	case flow.ReasonDstRefused, flow.ReasonAppRefused, flow.ReasonHBONERefused:
		return socks.Refused
	case flow.ReasonDstTimeout, flow.ReasonAppTimeout, flow.ReasonHBONETimeout, flow.ReasonHBONEConnect, flow.ReasonDstUnreachable,
		flow.ReasonNoEndpoint, flow.ReasonConnectTimeout:
		return socks.HostUnreachable
	}
	return socks.GeneralFailure
}
