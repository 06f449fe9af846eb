package client

import (
	"fmt"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
)

// NodeInfo is who a proxy is, for the control plane.
type NodeInfo struct {
	Type       string // "ztunnel"; istiod decides by it what it serves
	InstanceIP string // "" is 1.1.1.1, as the reference does
	PodName    string
	Namespace  string
	NodeName   string
	Metadata   map[string]any // further entries
}

// Node builds the node message: id is type~ip~pod.namespace~namespace.svc.cluster.local.
func (n NodeInfo) Node() (*discovery.Node, error) {
	if n.Type == "" {
		n.Type = "ztunnel"
	}
	if n.InstanceIP == "" {
		n.InstanceIP = "1.1.1.1"
	}
	fields := map[string]any{
		"NAME": n.PodName, "NAMESPACE": n.Namespace, "INSTANCE_IPS": n.InstanceIP, "NODE_NAME": n.NodeName,
	}
	for k, v := range n.Metadata {
		fields[k] = v
	}
	md, err := structpb.NewStruct(fields)
	if err != nil {
		return nil, fmt.Errorf("build node metadata: %w", err)
	}
	id := n.Type + "~" + n.InstanceIP + "~" + n.PodName + "." + n.Namespace + "~" + n.Namespace + ".svc.cluster.local"
	return &discovery.Node{Id: id, Metadata: md}, nil
}
