package derive

import (
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/workload"
)

// namePorts adds the names of a service's ports, which the reference's wire format
// has no place for: SRV records are made of them.
func namePorts(w *workload.Service, ports []servicePort) {
	var x ambit.ServiceExtension
	for _, p := range ports {
		if p.name != "" {
			x.PortNames = append(x.PortNames, &ambit.ServiceExtension_PortName{Name: p.name, Port: p.port})
		}
	}
	if len(x.PortNames) > 0 {
		w.Extensions = append(w.Extensions, &workload.Extension{
			Name:   api.ServiceExtension,
			Config: &anypb.Any{TypeUrl: api.ServiceExtensionType, Value: marshal(&x)},
		})
	}
}
