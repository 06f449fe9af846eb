package crd

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// GatewayGroup is the group of the Gateway API.
const GatewayGroup = "gateway.networking.k8s.io"

// Gateway is a Gateway of the Gateway API: a waypoint, or the way into a network.
// Fields of type any are accepted and not read.
type Gateway struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   GatewaySpec   `json:"spec,omitempty"`
	Status GatewayStatus `json:"status,omitempty"`
}

// GatewaySpec is what the owner of a Gateway wants.
type GatewaySpec struct {
	GatewayClassName string           `json:"gatewayClassName,omitempty"`
	Listeners        []*Listener      `json:"listeners,omitempty"`
	Addresses        []GatewayAddress `json:"addresses,omitempty"`
	Infrastructure   any              `json:"infrastructure,omitempty"`
	AllowedListeners any              `json:"allowedListeners,omitempty"`
	DefaultScope     any              `json:"defaultScope,omitempty"`
	BackendTLS       any              `json:"backendTLS,omitempty"`
	TLS              any              `json:"tls,omitempty"`
}

// Listener is one port of a Gateway.
type Listener struct {
	Name          string         `json:"name,omitempty"`
	Hostname      string         `json:"hostname,omitempty"`
	Port          int32          `json:"port,omitempty"`
	Protocol      string         `json:"protocol,omitempty"`
	TLS           any            `json:"tls,omitempty"`
	AllowedRoutes *AllowedRoutes `json:"allowedRoutes,omitempty"`
}

// AllowedRoutes says who may attach to a listener.
type AllowedRoutes struct {
	Namespaces *RouteNamespaces `json:"namespaces,omitempty"`
	Kinds      any              `json:"kinds,omitempty"`
}

// RouteNamespaces says whose objects may attach.
type RouteNamespaces struct {
	From     FromNamespaces        `json:"from,omitempty"`
	Selector *metav1.LabelSelector `json:"selector,omitempty"`
}

// FromNamespaces chooses namespaces.
type FromNamespaces string

// Values of FromNamespaces; empty is FromSame.
const (
	FromSame     FromNamespaces = "Same"
	FromAll      FromNamespaces = "All"
	FromSelector FromNamespaces = "Selector"
)

// Values implements Enum.
func (FromNamespaces) Values() []string {
	return []string{string(FromSame), string(FromAll), string(FromSelector)}
}

// Types of addresses of a Gateway; empty is AddressIP.
const (
	AddressIP       = "IPAddress"
	AddressHostname = "Hostname"
)

// GatewayAddress is where a Gateway can be reached.
type GatewayAddress struct {
	Type  string `json:"type,omitempty"`
	Value string `json:"value,omitempty"`
}

// GatewayStatus is what a controller reports. Only the addresses are read, and
// whether there is a report at all.
type GatewayStatus struct {
	Addresses            []GatewayAddress `json:"addresses,omitempty"`
	Conditions           []any            `json:"conditions,omitempty"`
	Listeners            []any            `json:"listeners,omitempty"`
	AttachedListenerSets any              `json:"attachedListenerSets,omitempty"`
}

// Reported tells whether a controller has taken the Gateway up.
func (s *GatewayStatus) Reported() bool {
	return len(s.Addresses) > 0 || len(s.Conditions) > 0 || len(s.Listeners) > 0
}

// GatewayClass holds defaults of its Gateways.
type GatewayClass struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   GatewayClassSpec `json:"spec,omitempty"`
	Status Status           `json:"status,omitempty"`
}

// GatewayClassSpec names who looks after the Gateways of a class.
type GatewayClassSpec struct {
	ControllerName string `json:"controllerName,omitempty"`
	ParametersRef  any    `json:"parametersRef,omitempty"`
	Description    string `json:"description,omitempty"`
}

// Validate implements Validator.
func (g *Gateway) Validate() []Fault {
	var fs faults
	if g.Spec.GatewayClassName == "" {
		fs.add("spec.gatewayClassName", "a waypoint has class istio-waypoint", "is missing")
	}
	names := map[string]bool{}
	for i, l := range g.Spec.Listeners {
		at := fmt.Sprintf("spec.listeners[%d]", i)
		switch {
		case l.Name == "":
			fs.add(at+".name", "", "is missing")
		case names[l.Name]:
			fs.add(at+".name", "names of listeners are unique", "%q is used twice", l.Name)
		}
		names[l.Name] = true
		if l.Port <= 0 || l.Port > maxPort {
			fs.add(at+".port", "use a port from 1 to 65535", "port %d is out of range", l.Port)
		}
		if l.Protocol == "" {
			fs.add(at+".protocol", "a waypoint listens with protocol HBONE", "is missing")
		}
		fs.allowedRoutes(at+".allowedRoutes.namespaces", l.AllowedRoutes)
	}
	return fs
}

func (fs *faults) allowedRoutes(path string, a *AllowedRoutes) {
	if a == nil || a.Namespaces == nil {
		return
	}
	if a.Namespaces.From == FromSelector && a.Namespaces.Selector == nil {
		fs.add(path, "add a selector, or use from: All", "from: Selector needs a selector")
	}
	if a.Namespaces.Selector != nil {
		if _, err := metav1.LabelSelectorAsSelector(a.Namespaces.Selector); err != nil {
			fs.add(path+".selector", "", "%v", err)
		}
	}
}
