package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
)

// podArgs are CNI_ARGS as Kubernetes' runtimes fill them.
type podArgs struct{ namespace, name, uid string }

// parseArgs reads "KEY=VALUE;KEY=VALUE". Keys that are not ours are other plugins'.
func parseArgs(s string) podArgs {
	var p podArgs
	for pair := range strings.SplitSeq(s, ";") {
		key, value, _ := strings.Cut(pair, "=")
		switch key {
		case "K8S_POD_NAMESPACE":
			p.namespace = value
		case "K8S_POD_NAME":
			p.name = value
		case "K8S_POD_UID":
			p.uid = value
		}
	}
	return p
}

// attachment is the request's pod, or false if the runtime does not say that it is
// one of Kubernetes'.
func attachment(c *call, args *skel.CmdArgs) (attach.Attachment, bool) {
	p := parseArgs(args.Args)
	return attach.Attachment{
		Network: c.Name, ContainerID: args.ContainerID, NetNS: args.Netns,
		UID: p.uid, Namespace: p.namespace, Name: p.name,
	}, p.namespace != "" && p.name != ""
}

// addresses reads the pod's addresses from the result of the plugins before us, in
// whatever version of the specification that is.
func addresses(cniVersion string, prevResult json.RawMessage) ([]netip.Addr, error) {
	result, err := version.NewResult(cniVersion, prevResult)
	if err != nil {
		return nil, err
	}
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	for i, ip := range r.IPs {
		if n := ip.Interface; n != nil && *n >= 0 && *n < len(r.Interfaces) && r.Interfaces[*n].Sandbox == "" {
			continue // of the node's end
		}
		a, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return nil, fmt.Errorf("ips[%d] has no address", i)
		}
		addrs = append(addrs, a.Unmap())
	}
	return addrs, nil
}
