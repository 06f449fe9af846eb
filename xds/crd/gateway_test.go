package crd

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestGatewayRules(t *testing.T) {
	listener := func(l Listener) GatewaySpec {
		return GatewaySpec{GatewayClassName: "istio-waypoint", Listeners: []*Listener{&l}}
	}
	allow := func(r RouteNamespaces) GatewaySpec {
		return listener(Listener{Name: "mesh", Port: 15008, Protocol: "HBONE", AllowedRoutes: &AllowedRoutes{Namespaces: &r}})
	}
	team := &metav1.LabelSelector{MatchLabels: map[string]string{"team": "a"}}
	tests := []struct {
		name string
		spec GatewaySpec
		want string // start of the only fault, "" when valid
	}{
		{"waypoint", listener(Listener{Name: "mesh", Port: 15008, Protocol: "HBONE"}), ""},
		{"no listener", GatewaySpec{GatewayClassName: "istio-remote"}, ""},
		{"no class", GatewaySpec{}, "spec.gatewayClassName: is missing"},
		{"no name", listener(Listener{Port: 1, Protocol: "HBONE"}), "spec.listeners[0].name: is missing"},
		{"two of a name", GatewaySpec{GatewayClassName: "c", Listeners: []*Listener{{Name: "a", Port: 1, Protocol: "TCP"}, {Name: "a", Port: 2, Protocol: "TCP"}}}, `spec.listeners[1].name: "a" is used twice`},
		{"port 0", listener(Listener{Name: "a", Protocol: "HBONE"}), "spec.listeners[0].port: port 0 is out of range"},
		{"port too large", listener(Listener{Name: "a", Port: 65536, Protocol: "HBONE"}), "spec.listeners[0].port: port 65536"},
		{"no protocol", listener(Listener{Name: "a", Port: 1}), "spec.listeners[0].protocol: is missing"},
		{"everybody", allow(RouteNamespaces{From: FromAll}), ""},
		{"some", allow(RouteNamespaces{From: FromSelector, Selector: team}), ""},
		{"some without selector", allow(RouteNamespaces{From: FromSelector}), "spec.listeners[0].allowedRoutes.namespaces: from: Selector needs"},
		{"a selector that is none", allow(RouteNamespaces{From: FromSelector, Selector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Is"}}}}), "spec.listeners[0].allowedRoutes.namespaces.selector: "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { wantFault(t, (&Gateway{Spec: tt.spec}).Validate(), tt.want) })
	}
}

func TestTelemetryRules(t *testing.T) {
	logging := func(a AccessLogging) TelemetrySpec { return TelemetrySpec{AccessLogging: []*AccessLogging{&a}} }
	off := true
	tests := []struct {
		name string
		spec TelemetrySpec
		want string
	}{
		{"nothing", TelemetrySpec{}, ""},
		{"off", logging(AccessLogging{Disabled: &off, Match: &AccessLogMatch{Mode: ModeServer}}), ""},
		{"selector and targets", TelemetrySpec{Selector: &Selector{}, TargetRefs: []*TargetRef{{Kind: "Gateway", Name: "a"}}}, "spec: only one of"},
		{"label wildcard", TelemetrySpec{Selector: &Selector{MatchLabels: map[string]string{"a": "*"}}}, "spec.selector.matchLabels[a]: wildcards"},
		{"too many targets", TelemetrySpec{TargetRefs: make([]*TargetRef, 17)}, "spec.targetRefs: 17 targets"},
		{"empty filter", logging(AccessLogging{Filter: &AccessLogFilter{}}), "spec.accessLogging[0].filter.expression: is empty"},
		{"nameless provider", logging(AccessLogging{Providers: []*ExternalProvider{{}}}), "spec.accessLogging[0].providers[0].name: is missing"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { wantFault(t, (&Telemetry{Spec: tt.spec}).Validate(), tt.want) })
	}
}
