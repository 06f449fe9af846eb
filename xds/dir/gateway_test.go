package dir

import (
	"testing"

	"github.com/ambit-mesh/ambit/xds/crd"
)

// A Gateway and a Telemetry with every field that their schemas have, as
// `kubectl get -o yaml` prints them, and slips in them.
func TestDecodeGatewayAndTelemetry(t *testing.T) {
	objects, problems := Decode("f.yaml", []byte(`
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: n, labels: {istio.io/waypoint-for: all}}
spec:
  gatewayClassName: istio-waypoint
  addresses: [{type: IPAddress, value: 192.0.2.1}]
  infrastructure: {labels: {a: b}, annotations: {c: d}, parametersRef: {group: "", kind: ConfigMap, name: x}}
  allowedListeners: {namespaces: {from: None}}
  tls: {backend: {clientCertificateRef: {name: x}}, frontend: {default: {}}}
  listeners:
  - name: mesh
    hostname: "*.example"
    port: 15008
    protocol: HBONE
    tls: {mode: Terminate, options: {gateway.istio.io/tls-terminate-mode: ISTIO_MUTUAL}, certificateRefs: [{name: c}]}
    allowedRoutes:
      kinds: [{kind: HTTPRoute}]
      namespaces: {from: Selector, selector: {matchLabels: {a: b}, matchExpressions: [{key: c, operator: In, values: [d]}]}}
status:
  addresses: [{type: Hostname, value: wp.n.svc.cluster.local}]
  attachedListenerSets: 0
  conditions: [{type: Programmed, status: "True", reason: Programmed, message: "", lastTransitionTime: "2026-01-01T00:00:00Z", observedGeneration: 1}]
  listeners: [{name: mesh, attachedRoutes: 1, supportedKinds: [], conditions: []}]
---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: GatewayClass
metadata: {name: vendor}
spec: {controllerName: vendor.example/x, description: d, parametersRef: {group: g, kind: k, name: n}}
status: {conditions: [], supportedFeatures: [{name: Gateway}]}
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: t, namespace: n}
spec:
  selector: {matchLabels: {a: b}}
  tracing: [{match: {mode: CLIENT}, providers: [{name: zipkin}], randomSamplingPercentage: 1.5, disableSpanReporting: false, customTags: {a: {literal: {value: b}}}}]
  metrics: [{providers: [{name: prometheus}], reportingInterval: 10s, overrides: [{match: {metric: ALL_METRICS, mode: SERVER}, tagOverrides: {a: {operation: REMOVE}}}]}]
  accessLogging: [{match: {mode: CLIENT_AND_SERVER}, providers: [{name: envoy}], disabled: false, filter: {expression: "response.code >= 400"}}]
status: {conditions: []}
`))
	for _, p := range problems {
		t.Error(p)
	}
	if len(objects) != 3 {
		t.Fatalf("%d objects", len(objects))
	}
	g := objects[0].Value.(*crd.Gateway)
	l := g.Spec.Listeners[0]
	if l.Port != 15008 || l.AllowedRoutes.Namespaces.From != crd.FromSelector || len(l.AllowedRoutes.Namespaces.Selector.MatchExpressions) != 1 || !g.Status.Reported() {
		t.Errorf("decoded as %+v", g)
	}
	if a := objects[2].Value.(*crd.Telemetry).Spec.AccessLogging[0]; a.Filter.Expression != "response.code >= 400" || *a.Disabled {
		t.Errorf("decoded as %+v", a)
	}

	for in, want := range map[string]string{
		"spec: {gatewayClassName: c, listeners: [{name: a, port: 1, protocol: HBONE, allowedRoutes: {namespaces: {from: Al}}}]}": `f.yaml:4 Gateway default/a spec.listeners[0].allowedRoutes.namespaces.from: unsupported value "Al", did you mean "All"?`,
		"spec: {gatewayClass: c}": `f.yaml:4 Gateway default/a spec.gatewayClass: unknown field "gatewayClass", valid are addresses, allowedListeners, backendTLS, defaultScope, gatewayClassName, infrastructure, listeners, tls`,
		"spec: {gatewayClassName: c, listeners: [{name: a, port: \"1\", protocol: HBONE}]}": `f.yaml:4 Gateway default/a spec.listeners[0].port: expected an integer, found string "1", remove the quotes`,
		"spec: {gatewayClassName: c, listeners: [{name: a, port: 0, protocol: HBONE}]}":     `f.yaml:4 Gateway default/a spec.listeners[0].port: port 0 is out of range, use a port from 1 to 65535`,
	} {
		_, problems := Decode("f.yaml", []byte("apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: a}\n"+in+"\n"))
		if len(problems) != 1 || problems[0].String() != want {
			t.Errorf("%s:\ngot  %v\nwant %s", in, problems, want)
		}
	}
}
