package controller

import (
	"log/slog"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
)

// world is a store with two nodes and a controller over it.
type world struct {
	*testing.T
	store *cluster.Store
	c     *Controller
}

func newWorld(t *testing.T, text string) world {
	t.Helper()
	s, err := cluster.New("")
	if err != nil {
		t.Fatal(err)
	}
	w := world{t, s, New(Config{Store: s, Nodes: []string{"node-1", "node-2"}, IPv6: true, Log: slog.New(slog.DiscardHandler)})}
	w.apply("apiVersion: v1\nkind: Node\nmetadata: {name: node-1, labels: {disk: ssd}}\n---\napiVersion: v1\nkind: Node\nmetadata: {name: node-2}\n---\n" + text)
	return w
}

func (w world) apply(text string) {
	w.Helper()
	all, err := cluster.Decode(strings.NewReader(text), "test")
	if err != nil {
		w.Fatal(err)
	}
	for _, o := range all {
		if _, err := w.store.Apply(o); err != nil {
			w.Fatal(err)
		}
	}
	w.settle()
}

// settle reconciles and plays a kubelet that needs no time.
func (w world) settle() {
	w.Helper()
	for range 12 {
		if err := w.c.Reconcile(); err != nil {
			w.Fatal(err)
		}
		for _, p := range cluster.List[*corev1.Pod](w.store, "") {
			if p.DeletionTimestamp != nil {
				_ = w.store.Forget(cluster.KeyOf(p)) // without files nothing can fail
				continue
			}
			if p.Spec.NodeName != "" && p.Status.Phase != corev1.PodSucceeded {
				_ = cluster.Update(w.store, p.Namespace, p.Name, func(p *corev1.Pod) bool {
					p.Status.Phase = corev1.PodRunning
					p.Status.PodIPs = []corev1.PodIP{{IP: "10.244.1." + map[string]string{"node-1": "2", "node-2": "3"}[p.Spec.NodeName]}, {IP: "fd00::2"}}
					setCondition(p, corev1.PodReady, corev1.ConditionTrue, "", "")
					return true
				}) // listed above
			}
		}
	}
}

func (w world) pods() []*corev1.Pod { return cluster.List[*corev1.Pod](w.store, "default") }

const web = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, image: echo:1, ports: [{name: http, containerPort: 8080}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]}
`

func TestDeploymentMakesPodsOnBothNodes(t *testing.T) {
	w := newWorld(t, web)
	nodes := map[string]int{}
	for _, p := range w.pods() {
		nodes[p.Spec.NodeName]++
		if !strings.HasPrefix(p.Name, "web-") || p.Labels[templateHash] == "" || p.OwnerReferences[0].Kind != "ReplicaSet" {
			t.Errorf("pod %s: labels %v, owners %v", p.Name, p.Labels, p.OwnerReferences)
		}
	}
	if nodes["node-1"] != 1 || nodes["node-2"] != 1 {
		t.Errorf("pods per node: %v", nodes)
	}
	w.apply(strings.Replace(web, "replicas: 2", "replicas: 3", 1))
	if n := len(w.pods()); n != 3 {
		t.Errorf("%d pods after scaling to 3", n)
	}
	w.apply(strings.Replace(web, "echo:1", "echo:2", 1))
	for _, p := range w.pods() {
		if p.Spec.Containers[0].Image != "echo:2" {
			t.Errorf("pod %s still has %s", p.Name, p.Spec.Containers[0].Image)
		}
	}
	if err := w.store.Delete(cluster.Key{Kind: "Deployment", Namespace: "default", Name: "web"}); err != nil {
		t.Fatal(err)
	}
	w.settle()
	if n := len(w.pods()); n != 0 {
		t.Errorf("%d pods outlive their Deployment", n)
	}
}

func TestServiceGetsAddressesAndEndpoints(t *testing.T) {
	w := newWorld(t, web)
	s, _ := cluster.Get[*corev1.Service](w.store, "default", "web")
	if len(s.Spec.ClusterIPs) != 2 || !strings.HasPrefix(s.Spec.ClusterIPs[0], "10.96.") || !strings.HasPrefix(s.Spec.ClusterIPs[1], "fd00:10:96::") {
		t.Errorf("addresses %v", s.Spec.ClusterIPs)
	}
	slices := cluster.List[*discoveryv1.EndpointSlice](w.store, "default")
	if len(slices) != 2 {
		t.Fatalf("%d slices, want one per family", len(slices))
	}
	for _, e := range slices {
		if len(e.Endpoints) != 2 || *e.Ports[0].Port != 8080 || !*e.Endpoints[0].Conditions.Ready {
			t.Errorf("slice %s: %+v", e.Name, e.Endpoints)
		}
	}
	if vips := VIPs(w.store); len(vips) != 2 || len(vips[0].Backends) != 2 || vips[0].Port != 80 {
		t.Errorf("translated: %+v", vips)
	}
}

// What has changed and is not reconciled yet is named, and nothing is when it is.
func TestBehind(t *testing.T) {
	w := newWorld(t, `
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec: {containers: [{name: c, image: echo}]}
`)
	check := func(what string, want int) {
		t.Helper()
		if got := Behind(w.store, "default"); len(got) != want {
			t.Errorf("%s: %q, want %d", what, got, want)
		}
	}
	check("settled", 0)
	change := func(f func(*corev1.Pod)) {
		t.Helper()
		if err := cluster.Update(w.store, "default", "web", func(p *corev1.Pod) bool { f(p); return true }); err != nil {
			t.Fatal(err)
		}
	}
	change(func(p *corev1.Pod) { setCondition(p, corev1.PodReady, corev1.ConditionFalse, "", "") })
	check("a pod is not ready any more", 1)
	w.settle()
	check("reconciled", 0)
	change(func(p *corev1.Pod) { p.Labels = nil })
	check("a pod left the service", 1)
	w.settle()
	check("reconciled", 0)
	if err := w.store.Put(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "fresh"}}); err != nil {
		t.Fatal(err)
	}
	check("a service has no address", 1)
	if got := Behind(w.store, "elsewhere"); len(got) != 0 {
		t.Errorf("another namespace: %q", got)
	}
}

func TestStatefulSetDaemonSetAndJob(t *testing.T) {
	const template = "template: {metadata: {labels: {app: x}}, spec: {restartPolicy: Always, containers: [{name: c, image: echo}]}}"
	w := newWorld(t, `
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec: {serviceName: db, replicas: 2, selector: {matchLabels: {app: x}}, `+template+`}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec: {selector: {matchLabels: {app: x}}, `+template+`}
---
apiVersion: batch/v1
kind: Job
metadata: {name: once}
spec: {completions: 2, parallelism: 2, `+template+`}
`)
	names := map[string]int{}
	for _, p := range w.pods() {
		names[strings.SplitN(p.Name, "-", 2)[0]]++
		if strings.HasPrefix(p.Name, "db-") && (p.Spec.Hostname != p.Name || p.Spec.Subdomain != "db") {
			t.Errorf("pod %s is called %s.%s", p.Name, p.Spec.Hostname, p.Spec.Subdomain)
		}
	}
	if names["db"] != 2 || names["agent"] != 2 || names["once"] != 2 {
		t.Errorf("pods: %v", names)
	}
}

func TestPodWithoutAFittingNodeSaysSo(t *testing.T) {
	w := newWorld(t, `
apiVersion: v1
kind: Pod
metadata: {name: picky}
spec: {nodeSelector: {disk: tape}, containers: [{name: c, image: echo}]}
---
apiVersion: v1
kind: Pod
metadata: {name: fast}
spec: {nodeSelector: {disk: ssd}, containers: [{name: c, image: echo}]}
`)
	for _, p := range w.pods() {
		switch {
		case p.Name == "fast" && p.Spec.NodeName != "node-1":
			t.Errorf("fast runs on %q", p.Spec.NodeName)
		case p.Name == "picky" && (p.Spec.NodeName != "" || len(p.Status.Conditions) == 0 || p.Status.Conditions[0].Reason != "Unschedulable"):
			t.Errorf("picky: node %q, conditions %v", p.Spec.NodeName, p.Status.Conditions)
		}
	}
}
