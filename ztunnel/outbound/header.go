package outbound

import (
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
)

// headers of the CONNECT request, the reference's three, and one more across
// networks.
func headers(c *flow.Conn, plan Plan, self *mesh.Workload) []hbone.HeaderField {
	forwarded := `for="` + c.Record().SrcAddr.String() + `"`
	if plan.Service != nil {
		forwarded += ";host=" + plan.Service.Host.Name
	}
	h := []hbone.HeaderField{
		{Name: "baggage", Value: Baggage(self)},
		{Name: "forwarded", Value: forwarded},
		{Name: "traceparent", Value: c.TraceParent()},
	}
	if plan.Inner != nil { // also the nameless network is one
		h = append(h, hbone.HeaderField{Name: NetworkHeader, Value: self.Network})
	}
	return h
}

// NetworkHeader says, to the end of a tunnel into another network, which one
// its client is in: addresses there mean nothing here.
const NetworkHeader = "x-forwarded-network"
