package derive

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/crd"
	"github.com/ambit-mesh/ambit/xds/dir"
	"github.com/ambit-mesh/ambit/xds/identity"
)

func object(kind, ns, name string, v any) *dir.Object {
	o := &dir.Object{Namespace: ns, Name: name, Value: v}
	o.GVK.Kind = kind
	return o
}

func testPod(ns, name, node, account, app string, i int) *dir.Object {
	return object("Pod", ns, name, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID(ns + "-" + name), Labels: map[string]string{"app": app, "tier": "x"}},
		Spec: corev1.PodSpec{NodeName: node, ServiceAccountName: account, Containers: []corev1.Container{{
			Name: "c", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
		}}},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIP: fmt.Sprintf("10.%d.%d.%d", i>>16&255, i>>8&255, i&255),
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
		},
	})
}

func testService(ns, name, app string, i int) *dir.Object {
	return object("Service", ns, name, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"app": app}, ClusterIP: fmt.Sprintf("172.16.%d.%d", i>>8&255, i&255),
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("http")}},
		},
	})
}

// testSlice has one endpoint, a pod or (without a name) an address elsewhere.
func testSlice(ns, name, service, pod string, i int) *dir.Object {
	port, portName := int32(8000+i), "http"
	ep := discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("192.0.2.%d", i)}}
	if pod != "" {
		ep.TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: pod}
	}
	return object("EndpointSlice", ns, name, &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4, Endpoints: []discoveryv1.Endpoint{ep},
		Ports: []discoveryv1.EndpointPort{{Name: &portName, Port: &port}},
	})
}

func testPeer(ns, name string, selector map[string]string, mode crd.MTLSMode) *dir.Object {
	p := &crd.PeerAuthentication{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}}
	p.Spec.MTLS = &crd.MTLS{Mode: mode}
	if selector != nil {
		p.Spec.Selector = &crd.Selector{MatchLabels: selector}
	}
	return object("PeerAuthentication", ns, name, p)
}

func testPolicy(ns, name string, selector map[string]string, action crd.Action, from string) *dir.Object {
	p := &crd.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}}
	p.Spec.Action = action
	p.Spec.Rules = []*crd.Rule{{From: []*crd.From{{Source: &crd.Source{Namespaces: []string{from}}}}}}
	if selector != nil {
		p.Spec.Selector = &crd.Selector{MatchLabels: selector}
	}
	return object("AuthorizationPolicy", ns, name, p)
}

// testEntry has the endpoint 192.0.2.i, or a selector.
func testEntry(ns, name string, created int, selector map[string]string, i int, hosts ...string) *dir.Object {
	se := &crd.ServiceEntry{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, CreationTimestamp: metav1.Unix(int64(created), 0)}}
	se.Spec = crd.ServiceEntrySpec{Hosts: hosts, Resolution: crd.ResolutionStatic, Ports: []*crd.EntryPort{{Number: 80, Name: "http", Protocol: "HTTP"}}}
	if selector != nil {
		se.Spec.WorkloadSelector = &crd.WorkloadSelector{Labels: selector}
	} else {
		se.Spec.Endpoints = []*crd.WorkloadEntrySpec{{Address: fmt.Sprintf("192.0.2.%d", i)}}
	}
	return object("ServiceEntry", ns, name, se)
}

func testWorkloadEntry(ns, name, app string, i int) *dir.Object {
	w := &crd.WorkloadEntry{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{"app": app, "tier": "x"}}}
	w.Spec.Address = fmt.Sprintf("192.0.2.%d", i)
	return object("WorkloadEntry", ns, name, w)
}

// testWaypoint is a Gateway that is ready.
func testWaypoint(ns, name string, port int32) *dir.Object {
	g := &crd.Gateway{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}}
	g.Spec.GatewayClassName = classWaypoint
	g.Spec.Listeners = []*crd.Listener{{Name: "mesh", Port: port, Protocol: protocolHBONE}}
	g.Status.Addresses = []crd.GatewayAddress{{Type: crd.AddressHostname, Value: name + "." + ns + ".svc.cluster.local"}}
	return object("Gateway", ns, name, g)
}

// testWayInto is a Gateway that leads into a network.
func testWayInto(ns, network string) *dir.Object {
	o := labelled(testWaypoint(ns, "to-"+network, 15008), networkLabel, network)
	g := o.Value.(*crd.Gateway)
	g.Spec.GatewayClassName, g.Spec.Addresses = classRemote, []crd.GatewayAddress{{Value: "192.0.2.1"}}
	return o
}

// testTelemetry turns access logs off.
func testTelemetry(ns, name string, selector map[string]string) *dir.Object {
	off := true
	t := &crd.Telemetry{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}}
	t.Spec.AccessLogging = []*crd.AccessLogging{{Disabled: &off}}
	if selector != nil {
		t.Spec.Selector = &crd.Selector{MatchLabels: selector}
	}
	return object("Telemetry", ns, name, t)
}

func labelled(o *dir.Object, key, value string) *dir.Object {
	m := o.Value.(metav1.Object)
	labels := maps.Clone(m.GetLabels())
	if labels == nil {
		labels = map[string]string{}
	}
	labels[key] = value
	m.SetLabels(labels)
	return o
}

// cluster makes pods in namespaces of 100, each with 10 services of 10 pods.
func cluster(pods int) dir.Change {
	var c dir.Change
	for n := range 100 {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("node-%d", n), Labels: map[string]string{corev1.LabelTopologyZone: fmt.Sprint(n % 3)}}}
		c.Upserts = append(c.Upserts, object("Node", "", node.Name, node))
	}
	for i := range pods {
		ns, app := fmt.Sprintf("ns-%d", i/100), fmt.Sprintf("app-%d", i/10%10)
		c.Upserts = append(c.Upserts, testPod(ns, fmt.Sprintf("pod-%d", i), fmt.Sprintf("node-%d", i%100), "sa-"+app, app, i))
		if i%10 == 0 {
			c.Upserts = append(c.Upserts, testService(ns, app, app, i/10))
		}
	}
	return c
}

func upsert(o *dir.Object) dir.Change { return dir.Change{Upserts: []*dir.Object{o}} }

func TestOneChangeRecomputesWhatItTouches(t *testing.T) {
	e := New(Config{})
	e.Apply(cluster(1000))
	tests := []struct {
		name             string
		change           dir.Change
		want             computed
		upserts, removes int
	}{
		{"a pod again", dir.Change{Upserts: []*dir.Object{testPod("ns-3", "pod-310", "node-10", "sa-app-1", "app-1", 310)}}, computed{Pods: 1}, 0, 0},
		{"a pod moves", dir.Change{Upserts: []*dir.Object{testPod("ns-3", "pod-310", "node-11", "sa-app-1", "app-1", 310)}}, computed{Pods: 1}, 1, 0},
		{"a pod goes", dir.Change{Deletes: []dir.Key{{Kind: "Pod", Namespace: "ns-3", Name: "pod-310"}}}, computed{Pods: 1}, 0, 1},
		{"a service's selector", dir.Change{Upserts: []*dir.Object{testService("ns-4", "app-1", "app-2", 41)}}, computed{Pods: 20, Services: 1}, 20, 0},
		{"a policy for one app", dir.Change{Upserts: []*dir.Object{testPolicy("ns-5", "p", map[string]string{"app": "app-1"}, crd.ActionDeny, "x")}}, computed{Pods: 10, Policies: 1}, 11, 0},
		{"other rules", dir.Change{Upserts: []*dir.Object{testPolicy("ns-5", "p", map[string]string{"app": "app-1"}, crd.ActionDeny, "y")}}, computed{Policies: 1}, 1, 0},
		{"a policy for the namespace", dir.Change{Upserts: []*dir.Object{testPolicy("ns-5", "q", nil, crd.ActionDeny, "x")}}, computed{Policies: 1}, 1, 0},
		{"strict for the namespace", dir.Change{Upserts: []*dir.Object{testPeer("ns-5", "p", nil, crd.ModeStrict)}}, computed{Pods: 100, Peers: 1}, 100, 0},
		{"a second one changes nothing", dir.Change{Upserts: []*dir.Object{testPeer("ns-5", "q", nil, crd.ModePermissive)}}, computed{Peers: 2}, 0, 0},
		{"a node's heartbeat", dir.Change{Upserts: []*dir.Object{object("Node", "", "node-3", &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-3", Labels: map[string]string{corev1.LabelTopologyZone: "0", "x": "y"}}})}}, computed{}, 0, 0},
		{"a node's zone", dir.Change{Upserts: []*dir.Object{object("Node", "", "node-3", &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-3"}})}}, computed{Pods: 10}, 10, 0},
		{"a waypoint nobody uses", dir.Change{Upserts: []*dir.Object{testWaypoint("ns-6", "wp", 15008)}}, computed{Gateways: 1}, 0, 0},
		{"a service uses it", dir.Change{Upserts: []*dir.Object{labelled(testService("ns-6", "app-1", "app-1", 61), useWaypointLabel, "wp")}}, computed{Pods: 10, Services: 1}, 1, 0},
		{"it has another port", dir.Change{Upserts: []*dir.Object{testWaypoint("ns-6", "wp", 15009)}}, computed{Services: 1, Gateways: 1}, 1, 0},
		{"its status again", dir.Change{Upserts: []*dir.Object{testWaypoint("ns-6", "wp", 15009)}}, computed{Gateways: 1}, 0, 0},
		{"a namespace uses it", dir.Change{Upserts: []*dir.Object{labelled(object("Namespace", "", "ns-6", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns-6"}}), useWaypointLabel, "wp")}}, computed{Pods: 100, Services: 10}, 9, 0},
		{"its class", dir.Change{Upserts: []*dir.Object{object("GatewayClass", "", classWaypoint, &crd.GatewayClass{ObjectMeta: metav1.ObjectMeta{Name: classWaypoint}})}}, computed{Gateways: 1}, 0, 0},
		{"no logs of one app", dir.Change{Upserts: []*dir.Object{testTelemetry("ns-7", "t", map[string]string{"app": "app-1"})}}, computed{Pods: 10, Telemetries: 1}, 10, 0},
		{"no logs of a namespace", dir.Change{Upserts: []*dir.Object{testTelemetry("ns-7", "u", nil)}}, computed{Pods: 100, Telemetries: 1}, 90, 0},
		{"a second one changes nothing", dir.Change{Upserts: []*dir.Object{testTelemetry("ns-7", "v", nil)}}, computed{Telemetries: 2}, 0, 0},
		{"a way into a network where nobody is", dir.Change{Upserts: []*dir.Object{testWayInto("ns-8", "far")}}, computed{Gateways: 1}, 1, 0},
		{"somebody is there now", dir.Change{Upserts: []*dir.Object{labelled(testPod("ns-8", "pod-810", "node-10", "sa-app-1", "app-1", 810), networkLabel, "far")}}, computed{Pods: 1, Services: 1}, 2, 0},
		{"the way is closed", dir.Change{Deletes: []dir.Key{{Kind: "Gateway", Namespace: "ns-8", Name: "to-far"}}}, computed{Pods: 1, Gateways: 1}, 1, 1},
		{"a namespace's label", dir.Change{Upserts: []*dir.Object{object("Namespace", "", "ns-1", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns-1", Labels: map[string]string{"x": "y"}}})}}, computed{}, 0, 0},
		{"an entry with endpoints", upsert(testEntry("ns-6", "out", 1, nil, 1, "a.example.com", "b.example.com")), computed{Entries: 1}, 3, 0},
		{"the same again", upsert(testEntry("ns-6", "out", 1, nil, 1, "a.example.com", "b.example.com")), computed{Entries: 1}, 0, 0},
		{"an entry that selects pods", upsert(testEntry("ns-6", "vm", 2, map[string]string{"app": "app-1"}, 0, "vm.example.com")), computed{Pods: 10, Entries: 1}, 11, 0},
		{"a workload of both kinds of service", upsert(testWorkloadEntry("ns-6", "w", "app-1", 2)), computed{Workloads: 1}, 1, 0},
		{"a younger entry for a host", upsert(testEntry("ns-6", "late", 3, nil, 3, "a.example.com")), computed{Entries: 2}, 0, 0},
		{"an older one for the selected host", upsert(testEntry("ns-6", "early", 1, nil, 4, "vm.example.com")), computed{Pods: 10, Workloads: 1, Entries: 2}, 13, 0},
		{"the older one goes", dir.Change{Deletes: []dir.Key{{Kind: "ServiceEntry", Namespace: "ns-6", Name: "early"}}}, computed{Pods: 10, Workloads: 1, Entries: 2}, 12, 1},
		{"the same host in another namespace", upsert(testEntry("ns-7", "out", 9, nil, 1, "a.example.com")), computed{Entries: 2}, 3, 0},
		{"a policy for pods and workloads", upsert(testPolicy("ns-6", "p", map[string]string{"app": "app-1"}, crd.ActionDeny, "x")), computed{Pods: 10, Policies: 1, Workloads: 1}, 12, 0},
		{"a service's port", upsert(testService("ns-6", "app-1", "app-1", 61)), computed{Pods: 10, Services: 1, Workloads: 1}, 0, 0},
	}
	for _, tt := range tests {
		r := e.Apply(tt.change)
		if e.computed != tt.want || len(r.Upserts) != tt.upserts || len(r.Removes) != tt.removes {
			t.Errorf("%s: computed %+v and sent %d, removed %d; want %+v, %d, %d", tt.name, e.computed, len(r.Upserts), len(r.Removes), tt.want, tt.upserts, tt.removes)
		}
	}
	sameAsFromScratch(t, e)
}

// TestIncrementsAgreeWithOneStep applies random changes one at a time and in
// batches; the result must be what the final inputs give in one step, and what
// was sent must add up to it.
func TestIncrementsAgreeWithOneStep(t *testing.T) {
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		e := New(Config{})
		held := map[Name]string{}
		pick := func(s ...string) string { return s[rnd.IntN(len(s))] }
		selector := func() map[string]string {
			if rnd.IntN(2) == 0 {
				return nil
			}
			return map[string]string{pick("app", "tier"): pick("a", "b", "x")}
		}
		change := func() (o *dir.Object) {
			ns := pick("n", "m", "ambit-system", "istio-system")
			switch rnd.IntN(17) {
			case 13, 14:
				// Hosts of one object, of two in a namespace, in two namespaces, and of a service.
				hosts := []string{pick("a.example.com", "b.example.com"), pick("c.example.com", "*.example.com", "s1.n.svc.cluster.local")}
				se := testEntry(ns, pick("e1", "e2", "e3"), rnd.IntN(2), selector(), rnd.IntN(3), hosts[:1+rnd.IntN(2)]...)
				o := se.Value.(*crd.ServiceEntry)
				o.ObjectMeta = randomLabels(rnd, o.ObjectMeta)
				spec := &o.Spec
				for _, ep := range spec.Endpoints {
					ep.Network = pick("", "net1", "net2")
				}
				spec.ExportTo = [][]string{nil, {"."}, {"~"}}[rnd.IntN(3)]
				spec.Resolution = crd.Resolution(pick("STATIC", "STATIC", "DNS", "NONE", "DYNAMIC_DNS"))
				spec.Addresses = [][]string{nil, nil, {"240.240.0.0/17"}, {"2001:2::/49", "172.16.0.1"}}[rnd.IntN(4)]
				if theirs := e.entries.vips.addrs(nn{"n", "a.example.com"}); len(theirs) > 0 && rnd.IntN(4) == 0 {
					spec.Addresses = []string{theirs[rnd.IntN(len(theirs))].String()}
				}
				return se
			case 15, 16:
				w := testWorkloadEntry(ns, pick("w1", "w2"), pick("a", "b"), rnd.IntN(3))
				o := w.Value.(*crd.WorkloadEntry)
				o.ObjectMeta = randomLabels(rnd, o.ObjectMeta)
				o.Spec.Network = pick("", "", "net1", "net2")
				return w
			case 0:
				o := testService(ns, pick("s1", "s2", "wp"), pick("a", "b"), rnd.IntN(10))
				s := o.Value.(*corev1.Service)
				s.ObjectMeta = randomLabels(rnd, s.ObjectMeta)
				if rnd.IntN(2) == 0 {
					s.Spec.Selector = nil
				}
				if rnd.IntN(3) == 0 {
					s.Spec.ClusterIP = corev1.ClusterIPNone
				}
				if rnd.IntN(3) == 0 {
					s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: pick("198.51.100.1", "198.51.100.2")}}
				}
				return o
			case 6:
				return testSlice(ns, pick("e1", "e2"), pick("s1", "s2"), pick("pod1", "pod2", ""), rnd.IntN(3))
			case 1:
				return testPeer(ns, pick("p1", "p2"), selector(), crd.MTLSMode(pick("UNSET", "STRICT", "PERMISSIVE", "DISABLE")))
			case 2:
				return testPolicy(ns, pick("a1", "a2"), selector(), crd.Action(pick("ALLOW", "DENY", "AUDIT")), "x")
			case 3:
				return object("Node", "", "node", &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node", Labels: map[string]string{corev1.LabelTopologyZone: pick("1", "2")}}})
			case 4:
				if rnd.IntN(8) > 0 { // it hides what smaller changes miss
					return testPeer(ns, "p3", selector(), crd.ModeStrict)
				}
				m := &crd.Mesh{Config: crd.MeshConfig{TrustDomain: pick("", "td"), RootNamespace: pick("", "", "m")}}
				return object("MeshConfig", pick("ambit-system", "istio-system"), "istio", m)
			case 5:
				if was := e.namespaces[ns]; was != nil && rnd.IntN(2) == 0 { // what only selectors look at
					now := was.DeepCopy()
					now.Labels["team"] = pick("a", "b")
					return object("Namespace", "", ns, now)
				}
				return object("Namespace", "", ns, &corev1.Namespace{ObjectMeta: randomLabels(rnd, metav1.ObjectMeta{Name: ns, Annotations: map[string]string{trafficDistributionAnnotation: pick("", "PreferClose")}})})
			case 7:
				return randomGateway(rnd, ns)
			case 8:
				class := &crd.GatewayClass{ObjectMeta: metav1.ObjectMeta{Name: pick(classWaypoint, "own"), Labels: map[string]string{waypointForLabel: pick("", "all")}, Annotations: map[string]string{inboundBindingAnnotation: pick("PROXY/15088", "NONE")}}}
				class.Spec.ControllerName = pick(controllerWaypoint, "x")
				return object("GatewayClass", "", class.Name, class)
			case 9:
				return randomTelemetry(rnd, ns, selector())
			default:
				return randomPod(rnd, testPod(ns, pick("pod1", "pod2", "pod3"), pick("node", "other"), "sa", pick("a", "b"), rnd.IntN(50)))
			}
		}
		for i := range 200 {
			var c dir.Change
			for range 1 + rnd.IntN(3) {
				if o := change(); rnd.IntN(4) == 0 {
					c.Deletes = append(c.Deletes, o.Key())
				} else {
					c.Upserts = append(c.Upserts, o)
				}
			}
			r := e.Apply(c)
			for _, n := range r.Removes {
				if _, had := held[n]; !had {
					t.Fatalf("seed %d: removes %v, which nobody has", seed, n)
				}
				delete(held, n)
			}
			for _, u := range r.Upserts {
				if held[Name{u.Type, u.Name}] == string(u.Bytes) {
					t.Fatalf("seed %d: sends %s unchanged", seed, u.Name)
				}
				held[Name{u.Type, u.Name}] = string(u.Bytes)
			}
			if i%5 == 4 {
				if sameAsFromScratch(t, e); t.Failed() {
					t.Fatalf("seed %d, change %d", seed, i)
				}
			}
		}
		n := 0
		for _, typ := range []string{api.AddressType, api.AuthorizationType} {
			for _, r := range e.Resources(typ) {
				n++
				if held[Name{r.Type, r.Name}] != string(r.Bytes) {
					t.Errorf("seed %d: a proxy holds another %s", seed, r.Name)
				}
			}
		}
		if n != len(held) {
			t.Errorf("seed %d: a proxy holds %d resources of %d", seed, len(held), n)
		}
		if sameAsFromScratch(t, e); t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// randomLabels adds what binds objects to waypoints and to our own settings.
func randomLabels(rnd *rand.Rand, m metav1.ObjectMeta) metav1.ObjectMeta {
	m.Labels, m.Annotations = maps.Clone(m.Labels), maps.Clone(m.Annotations)
	if m.Labels == nil {
		m.Labels = map[string]string{}
	}
	if m.Annotations == nil {
		m.Annotations = map[string]string{}
	}
	for key, values := range map[string][]string{
		useWaypointLabel: {"wp", "none", "wp2"}, waypointNamespaceLabel: {"n", "m"},
		canaryLabel: {"wp2"}, ingressWaypointLabel: {"true", "x"}, networkLabel: {"net1", "net2"},
		gatewayNameLabel: {"wp"}, gatewayManagedLabel: {"istio.io-mesh-controller"}, "team": {"a", "b"},
	} {
		if v := values[rnd.IntN(len(values))]; rnd.IntN(4) == 0 {
			m.Labels[key] = v
		}
	}
	for key, values := range map[string][]string{
		canaryWeightAnnotation: {"20", "x"}, sameNodeAnnotation: {"hbone", "local", "x"}, accessLogAnnotation: {"off", "failures", "x"},
		redirectionAnnotation: {"enabled"},
	} {
		if v := values[rnd.IntN(len(values))]; rnd.IntN(4) == 0 {
			m.Annotations[key] = v
		}
	}
	return m
}

func randomPod(rnd *rand.Rand, o *dir.Object) *dir.Object {
	p := o.Value.(*corev1.Pod)
	p.ObjectMeta = randomLabels(rnd, p.ObjectMeta)
	if rnd.IntN(4) == 0 {
		p.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
	}
	if rnd.IntN(3) == 0 {
		p.Spec.Hostname, p.Spec.Subdomain = "h", "s1"
	}
	return o
}

func randomGateway(rnd *rand.Rand, ns string) *dir.Object {
	pick := func(s ...string) string { return s[rnd.IntN(len(s))] }
	g := &crd.Gateway{ObjectMeta: randomLabels(rnd, metav1.ObjectMeta{Namespace: ns, Name: pick("wp", "wp2")})}
	g.Labels[waypointForLabel] = pick("", "service", "workload", "all", "none", "x")
	g.Spec.GatewayClassName = pick(classWaypoint, classEastWest, classRemote, classIngress, "own")
	from := crd.FromNamespaces(pick("", "Same", "All", "Selector"))
	g.Spec.Listeners = []*crd.Listener{{Name: "mesh", Port: int32(15008 + rnd.IntN(2)), Protocol: pick(protocolHBONE, "HTTP")}}
	if from != "" {
		r := &crd.RouteNamespaces{From: from}
		if from == crd.FromSelector {
			r.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"team": pick("a", "b")}}
		}
		g.Spec.Listeners[0].AllowedRoutes = &crd.AllowedRoutes{Namespaces: r}
	}
	switch rnd.IntN(4) {
	case 0:
		g.Status.Addresses = []crd.GatewayAddress{{Type: pick("", crd.AddressIP, crd.AddressHostname), Value: pick("192.0.2.1", "wp.n.svc.cluster.local")}}
	case 1:
		g.Status.Conditions = []any{"x"}
	case 2:
		g.Spec.Addresses = []crd.GatewayAddress{{Value: pick("192.0.2.8", "192.0.2.9")}}
	}
	return object("Gateway", ns, g.Name, g)
}

func randomTelemetry(rnd *rand.Rand, ns string, selector map[string]string) *dir.Object {
	pick := func(s ...string) string { return s[rnd.IntN(len(s))] }
	t := &crd.Telemetry{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: pick("t1", "t2")}}
	if selector != nil {
		t.Spec.Selector = &crd.Selector{MatchLabels: selector}
	}
	for range rnd.IntN(3) {
		off := rnd.IntN(2) == 0
		a := &crd.AccessLogging{Match: &crd.AccessLogMatch{Mode: crd.WorkloadMode(pick("", "CLIENT", "SERVER"))}, Disabled: &off}
		if rnd.IntN(2) == 0 {
			a.Filter = &crd.AccessLogFilter{Expression: pick("response.code >= 400", "x")}
		}
		t.Spec.AccessLogging = append(t.Spec.AccessLogging, a)
	}
	if rnd.IntN(4) == 0 {
		t.Spec.Metrics = []any{"x"}
	}
	return object("Telemetry", ns, t.Name, t)
}

func TestCertificateView(t *testing.T) {
	e := New(Config{})
	id := identity.MustParse("spiffe://cluster.local/ns/n/sa/web")
	running := testPod("n", "a", "node-1", "web", "a", 1)
	e.Apply(dir.Change{Upserts: []*dir.Object{running, testPod("n", "b", "node-2", "", "a", 2)}})
	check := func(why, node string, id identity.ID, want bool) {
		t.Helper()
		if got := e.RunsOn(node, id); got != want {
			t.Errorf("%s: RunsOn(%s, %s) = %v", why, node, id, got)
		}
	}
	check("its node", "node-1", id, true)
	check("another node", "node-2", id, false)
	check("no node", "", id, false)
	check("no identity", "node-1", identity.ID{}, false)
	check("default account", "node-2", identity.MustParse("spiffe://cluster.local/ns/n/sa/default"), true)
	check("another trust domain", "node-1", identity.MustParse("spiffe://other/ns/n/sa/web"), false)
	check("another namespace", "node-1", identity.MustParse("spiffe://cluster.local/ns/m/sa/web"), false)
	if uid, node, ok := e.Pod("n", "a"); !ok || uid != "n-a" || node != "node-1" {
		t.Errorf("pod n/a: %q on %q, %v", uid, node, ok)
	}
	ended := testPod("n", "a", "node-1", "web", "a", 1)
	ended.Value.(*corev1.Pod).Status.Phase = corev1.PodSucceeded
	e.Apply(dir.Change{Upserts: []*dir.Object{ended}})
	check("ended", "node-1", id, false)
	if _, _, ok := e.Pod("n", "a"); ok {
		t.Error("a pod that has ended is found")
	}
	e.Apply(dir.Change{Upserts: []*dir.Object{running}})
	check("again", "node-1", id, true)
	e.Apply(dir.Change{Deletes: []dir.Key{running.Key()}})
	check("gone", "node-1", id, false)
	if _, _, ok := e.Pod("n", "a"); ok {
		t.Error("a deleted pod is found")
	}
}

func TestReadsAreSafeDuringApply(t *testing.T) {
	e := New(Config{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 50 {
			e.RunsOn("node-1", identity.MustParse("spiffe://cluster.local/ns/ns-0/sa/sa-app-0"))
			e.Pod("ns-0", "pod-1")
			e.Resources(api.AddressType)
			e.Status()
		}
	}()
	for i := range 5 {
		e.Apply(cluster(50 * (i + 1)))
	}
	<-done
}

// While the resources of a change are computed, the lock of the engine is held;
// certificates and status pages must not wait for it.
func TestCertificatesDoNotWaitForApply(t *testing.T) {
	e := New(Config{})
	e.Apply(dir.Change{Upserts: []*dir.Object{
		testPod("n", "a", "node-1", "web", "a", 1), testPolicy("n", "p", nil, "AUDIT", "x"),
	}})
	e.mu.Lock() // as Apply does
	defer e.mu.Unlock()
	donec := make(chan bool)
	go func() {
		_, _, known := e.Pod("n", "a")
		donec <- known && e.TrustDomain() == "cluster.local" && len(e.Status()) == 1 &&
			e.RunsOn("node-1", identity.MustParse("spiffe://cluster.local/ns/n/sa/web"))
	}()
	select {
	case ok := <-donec:
		if !ok {
			t.Error("reads during Apply do not see the state before")
		}
	case <-time.After(60 * time.Second):
		t.Fatal("reads wait for Apply")
	}
}

func BenchmarkOnePodAmong(b *testing.B) {
	for _, n := range []int{1_000, 10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			e := New(Config{})
			e.Apply(cluster(n))
			i := 0
			b.ReportAllocs()
			for b.Loop() {
				i++
				r := e.Apply(dir.Change{Upserts: []*dir.Object{testPod("ns-3", "pod-310", fmt.Sprintf("node-%d", i%2), "sa-app-1", "app-1", 310)}})
				if len(r.Upserts) != 1 {
					b.Fatal("nothing was sent")
				}
			}
		})
	}
}

// One of 10,000 ServiceEntries, each selecting WorkloadEntries of its namespace.
func BenchmarkOneEntryAmong(b *testing.B) {
	e := New(Config{})
	c := dir.Change{}
	for i := range 10_000 {
		ns, app := fmt.Sprintf("ns-%d", i/100), fmt.Sprintf("app-%d", i%100)
		c.Upserts = append(c.Upserts,
			testEntry(ns, app, 1, map[string]string{"app": app}, 0, app+"."+ns+".example.com"), testWorkloadEntry(ns, "vm-"+app, app, i%250))
	}
	e.Apply(c)
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		i++
		se := testEntry("ns-3", "app-7", 1, map[string]string{"app": "app-7"}, 0, "app-7.ns-3.example.com")
		se.Value.(*crd.ServiceEntry).Spec.Ports[0].Number = uint32(80 + i%2)
		if r := e.Apply(upsert(se)); len(r.Upserts) != 2 {
			b.Fatalf("sent %d", len(r.Upserts))
		}
	}
}

func BenchmarkFullState(b *testing.B) {
	c := cluster(10_000)
	b.ReportAllocs()
	for b.Loop() {
		New(Config{}).Apply(c)
	}
}
