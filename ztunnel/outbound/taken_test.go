package outbound

import (
	"net/netip"
	"testing"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

// A ServiceEntry with a pod's address, or a range with it, is in force for clients
// of its own namespace and where it is the pod's namespace that says so.
func TestAPodsAddressCannotBeTaken(t *testing.T) {
	in := func(ns string) func(*mesh.Workload) { return func(w *mesh.Workload) { w.Namespace = ns } }
	pod := wl("pod", "10.0.0.2", in("shop"))
	machine := wl("machine", "10.0.0.3", in("shop"), func(w *mesh.Workload) { w.UID = "c/networking.istio.io/WorkloadEntry/shop/machine" })
	for _, tc := range []struct {
		entry, client, dst string
		taken              bool
	}{
		{"evil", "bank", "10.0.0.2", false},
		{"evil", "shop", "10.0.0.2", false},
		{"evil", "evil", "10.0.0.2", true},
		{"shop", "bank", "10.0.0.2", true},
		{"evil", "bank", "10.0.0.3", true},
		{"evil", "bank", "10.0.0.4", true},
	} {
		for _, vip := range []string{tc.dst, "10.0.0.0/24", "0.0.0.0/0"} {
			for _, mode := range []workload.LoadBalancing_Mode{workload.LoadBalancing_UNSPECIFIED_MODE, workload.LoadBalancing_PASSTHROUGH} {
				entry := svc("grab", tc.dst, func(s *mesh.Service) {
					s.Namespace, s.Host.Namespace, s.Mode, s.Canonical = tc.entry, tc.entry, mode, true
					if p, err := netip.ParsePrefix(vip); err == nil {
						s.VIPs, s.CIDRs = nil, []mesh.NetPrefix{{Prefix: p}}
					}
				})
				src := wl("src", "10.0.0.1", in(tc.client))
				txn := mesh.Empty().Edit()
				for _, w := range []*mesh.Workload{src, pod, machine} {
					txn.PutWorkload(w)
				}
				txn.PutService(entry)
				plan, _ := Route(txn.Commit(), Request{Src: src, Dst: netip.AddrPortFrom(netip.MustParseAddr(tc.dst), 80)})
				if got := plan.Service == entry; got != tc.taken {
					t.Errorf("entry of %s with %s, client of %s to %s: taken %v, want %v", tc.entry, vip, tc.client, tc.dst, got, tc.taken)
				}
			}
		}
	}
}
