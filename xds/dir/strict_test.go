package dir

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/ambit-mesh/ambit/xds/crd"
)

func TestDecodeReportsWithPlaceAndHint(t *testing.T) {
	tests := []struct{ name, in, want string }{
		{"unknown field", "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  selectr: {a: b}\n",
			`f.yaml:5 Service default/a spec.selectr: unknown field "selectr", did you mean "selector"?`},
		{"duplicate key", "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  type: ClusterIP\n  type: NodePort\n",
			`f.yaml:6 Service default/a spec.type: duplicate field "type", the first is on line 5 of the document`},
		{"wrong type", "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports:\n  - port: \"80\"\n",
			`f.yaml:6 Service default/a spec.ports[0].port: expected an integer, found string "80", remove the quotes`},
		{"number as string", "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {x: 1}}\n",
			`f.yaml:3 Namespace a metadata.labels[x]: expected a string, found integer 1, write "1" in quotes`},
		{"yaml 1.1 boolean", "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {x: on}}\n",
			`f.yaml:3 Namespace a metadata.labels[x]: expected a string, found boolean on, write "on" in quotes`},
		{"bad enum", "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: a, namespace: n}\nspec:\n  mtls: {mode: STRIC}\n",
			`f.yaml:5 PeerAuthentication n/a spec.mtls.mode: unsupported value "STRIC", did you mean "STRICT"?`},
		{"bad kubernetes enum", "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports: [{port: 1, protocol: tcp}]\n",
			`f.yaml:5 Service default/a spec.ports[0].protocol: unsupported value "tcp", did you mean "TCP"?`},
		{"misplaced field", "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: a}\nspec:\n  matchLabels: {a: b}\n",
			`f.yaml:5 PeerAuthentication default/a spec.matchLabels: unknown field "matchLabels", it belongs under "selector"`},
		{"unknown kind", "apiVersion: security.istio.io/v1\nkind: AuthorisationPolicy\nmetadata: {name: a}\n",
			`f.yaml:1 AuthorisationPolicy a: unknown kind "AuthorisationPolicy" in "security.istio.io/v1", did you mean "AuthorizationPolicy"?`},
		{"unknown version", "apiVersion: v2\nkind: Pod\nmetadata: {name: a}\n",
			`f.yaml:1 Pod a: unknown apiVersion "v2" of kind Pod, did you mean "v1"?`},
		{"syntax", "a: b\n---\nkind: [\n", "f.yaml:1: kind is missing\nf.yaml:3: YAML syntax: did not find expected node content"},
		{"list item null", "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a}\nspec:\n  rules:\n  -\n",
			`f.yaml:6 AuthorizationPolicy default/a spec.rules[0]: item is empty, remove the item or fill it in; {} is an item without fields`},
		{"quantity", "apiVersion: v1\nkind: Node\nmetadata: {name: a}\nstatus: {capacity: {cpu: lots}}\n",
			`f.yaml:4 Node a status.capacity[cpu]: "lots" is not a quantity, examples are 500m, 2, 64Mi`},
		{"time", "apiVersion: v1\nkind: Pod\nmetadata: {name: a, deletionTimestamp: soon}\n",
			`f.yaml:3 Pod default/a metadata.deletionTimestamp: "soon" is not a time, an example is 2026-01-31T12:00:00Z`},
		{"name", "apiVersion: v1\nkind: Pod\nmetadata: {name: A_b}\n",
			`f.yaml:1 Pod default/A_b metadata.name: "A_b" is not a valid name, use lower case letters, digits, '-' and '.'`},
		{"list of objects", "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: a}\n  spc: {}\n",
			`f.yaml:7 Pod default/a spc: unknown field "spc", did you mean "spec"?`},
		{"mesh", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: ambit-system}\ndata:\n  mesh: |\n    connectTimeout: 1s\n    trustDomian: x\n",
			`f.yaml:7 MeshConfig ambit-system/istio data.mesh.trustDomian: unknown field "trustDomian", did you mean "trustDomain"?`},
		{"validation", "# c\n---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a}\nspec:\n  rules:\n  - from:\n    - source:\n        ipBlocks: [10.0.0.0/8, 10.0/8]\n",
			`f.yaml:10 AuthorizationPolicy default/a spec.rules[0].from[0].source.ipBlocks[1]: "10.0/8" is not an IP address or CIDR, examples are 10.0.0.0/8, 10.1.2.3, fd00::/8`},
		{"service entry", "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: a}\nspec:\n  hosts: [a.com]\n  resolution: STATC\n  endpoint: []\n",
			"f.yaml:6 ServiceEntry default/a spec.resolution: unsupported value \"STATC\", did you mean \"STATIC\"?\n" +
				`f.yaml:7 ServiceEntry default/a spec.endpoint: unknown field "endpoint", did you mean "endpoints"?`},
		{"service entry's rules", "apiVersion: networking.istio.io/v1alpha3\nkind: ServiceEntry\nmetadata: {name: a}\nspec:\n  hosts: [a.com]\n  resolution: STATIC\n  endpoints:\n  - address: unix:///a\n",
			`f.yaml:8 ServiceEntry default/a spec.endpoints[0].address: "unix:///a" is a unix socket: node proxies reach endpoints by IP address only, use an IP address and a port`},
		{"workload entry", "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {name: a}\nspec: {address: 10.0.0.1, ports: {http: \"80\"}}\n",
			`f.yaml:4 WorkloadEntry default/a spec.ports[http]: expected an integer, found string "80", remove the quotes`},
		{"workload group", "apiVersion: networking.istio.io/v1\nkind: WorkloadGroup\nmetadata: {name: a}\nspec: {template: {serviceAcount: a}}\n",
			`f.yaml:4 WorkloadGroup default/a spec.template.serviceAcount: unknown field "serviceAcount", did you mean "serviceAccount"?`},
		{"irrelevant kinds are checked too", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\nspec: {replica: 2}\n",
			`f.yaml:4 Deployment default/a spec.replica: unknown field "replica", did you mean "replicas"?`},
		{"unenforced kinds need a name", "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {}\n",
			`f.yaml:1 VirtualService metadata: name is missing`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, problems := Decode("f.yaml", []byte(tt.in))
			var got []string
			for _, p := range problems {
				got = append(got, p.String())
			}
			if g := strings.Join(got, "\n"); g != tt.want {
				t.Errorf("got\n%s\nwant\n%s", g, tt.want)
			}
		})
	}
}

func TestDecodeValues(t *testing.T) {
	objects, problems := Decode("f.yaml", []byte(`
%YAML 1.1
# a comment alone is no document
---
apiVersion: v1
kind: Pod
metadata:
  name: a
  creationTimestamp: 2026-01-02T03:04:05Z
  labels: &l {app: x}
spec:
  containers:
  - name: c
    resources: {limits: {cpu: 500m, memory: 64Mi}}
    ports: [{containerPort: 80, name: http}]
    readinessProbe: {httpGet: {port: http, path: /}, periodSeconds: 3}
    securityContext: {privileged: yes}
---
apiVersion: v1
kind: Secret
metadata: {name: s, managedFields: [{fieldsV1: {"f:data": {}}}]}
data: {k: aGk=}
---
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata: {name: p}
spec:
  selector: {matchLabels: {app: x}}
  portLevelMtls: {8080: {mode: STRICT}, "9090": {mode: DISABLE}}
---
---
apiVersion: v1
kind: ServiceList
items:
- metadata: {name: svc}
  spec: {ports: [{port: 80, targetPort: http}, {port: 81, targetPort: 8081}]}
- metadata: {name: svc2, labels: {<<: {a: b}, c: d}}
`))
	for _, p := range problems {
		t.Error(p)
	}
	if len(objects) != 5 {
		t.Fatalf("%d objects, want 5", len(objects))
	}
	pod := objects[0].Value.(*corev1.Pod)
	if c := pod.Spec.Containers[0]; c.Resources.Limits.Cpu().MilliValue() != 500 || c.ReadinessProbe.HTTPGet.Port.StrVal != "http" || !*c.SecurityContext.Privileged {
		t.Errorf("container %+v", c)
	}
	if objects[0].Line != 5 || pod.Namespace != "default" || pod.CreationTimestamp.Year() != 2026 || pod.Labels["app"] != "x" {
		t.Errorf("pod at line %d: %+v", objects[0].Line, pod.ObjectMeta)
	}
	if s := objects[1].Value.(*corev1.Secret); string(s.Data["k"]) != "hi" {
		t.Errorf("secret %q", s.Data)
	}
	if p := objects[2].Value.(*crd.PeerAuthentication); p.Spec.PortLevelMTLS[8080].Mode != crd.ModeStrict || p.Spec.PortLevelMTLS[9090].Mode != crd.ModeDisable {
		t.Errorf("ports %v", p.Spec.PortLevelMTLS)
	}
	if s := objects[3].Value.(*corev1.Service); s.Spec.Ports[0].TargetPort.StrVal != "http" || s.Spec.Ports[1].TargetPort.IntVal != 8081 {
		t.Errorf("service ports %v", s.Spec.Ports)
	}
	if s := objects[4].Value.(*corev1.Service); s.Labels["a"] != "b" || s.Labels["c"] != "d" {
		t.Errorf("merged labels %v", s.Labels)
	}
}

func TestDecodeIsBounded(t *testing.T) {
	laughs := "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\nx0: &x0 [a,a,a,a,a,a,a,a,a,a]\n"
	for i := 1; i < 10; i++ {
		p := string(rune('0' + i - 1))
		laughs += "x" + string(rune('0'+i)) + ": &x" + string(rune('0'+i)) + " [" + strings.Repeat("*x"+p+",", 9) + "*x" + p + "]\n"
	}
	for name, in := range map[string]string{
		"billion laughs": strings.Replace(laughs, "kind: Namespace", "kind: HTTPRoute", 1) + "",
		"self reference": "apiVersion: v1\nkind: Pod\nmetadata: &m {name: a, labels: *m}\nspec: &s {containers: [*s]}\n",
		"deep":           "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {name: a}\nspec: " + strings.Repeat("[", 3000) + strings.Repeat("]", 3000) + "\n",
		"many faults":    "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {" + strings.Repeat("a: b, ", 5000) + "}\n",
	} {
		t.Run(name, func(t *testing.T) {
			if strings.Contains(in, "HTTPRoute") {
				in = strings.Replace(in, "apiVersion: v1", "apiVersion: gateway.networking.k8s.io/v1", 1)
			}
			_, problems := Decode("f.yaml", []byte(in))
			if len(problems) == 0 || len(problems) > maxFaults {
				t.Errorf("%d problems", len(problems))
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: b, ports: [{containerPort: 80}]}]}\n"))
	f.Add([]byte("apiVersion: v1\nkind: List\nitems: [&a {apiVersion: v1, kind: Service, metadata: {name: a}}, *a]\n"))
	f.Add([]byte("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a}\nspec: {rules: [{from: [{source: {principals: ['*']}}], when: [{key: source.ip, values: [::1]}]}]}\n"))
	f.Add([]byte("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio}\ndata: {mesh: 'trustDomain: x'}\n"))
	f.Add([]byte("a: &a [*a]\n<<: *a\n--- {}\n...\n%x\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		objects, _ := Decode("f", data)
		for _, o := range objects {
			if o.Name == "" || o.Value == nil {
				t.Errorf("object %+v without a name or a value", o)
			}
		}
	})
}
