package app

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	yaml "go.yaml.in/yaml/v3"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
	"github.com/ambit-mesh/ambit/test/lab/controller"
	"github.com/ambit-mesh/ambit/test/lab/fabric"
	"github.com/ambit-mesh/ambit/test/lab/kubelet"
	"github.com/ambit-mesh/ambit/test/lab/mesh"
)

func sum(v any) uint64 {
	b, err := json.Marshal(v)
	if err != nil {
		panic("BUG: spec does not encode: " + err.Error())
	}
	h := fnv.New64a()
	_, _ = h.Write(b) // never fails
	return h.Sum64()
}

// get shows objects as kubectl does.
func (c *call) get(context.Context) (int, error) {
	if len(c.Args) == 0 {
		return 2, errors.New("get wants a KIND, and may have NAMEs")
	}
	ns := c.ns()
	if c.Flags["all-namespaces"] != "" {
		ns = ""
	}
	var found []cluster.Object
	for word := range strings.SplitSeq(c.Args[0], ",") {
		kind, ok := c.app.store.KindFor(word)
		if !ok {
			return 1, fmt.Errorf("there is no %q in the lab", word)
		}
		in := ns
		if clusterScoped(kind) {
			in = ""
		}
		found = append(found, c.app.store.List(kind, in)...)
	}
	if names := c.Args[1:]; len(names) > 0 {
		found = slices.DeleteFunc(found, func(o cluster.Object) bool { return !slices.Contains(names, o.GetName()) })
		if len(found) == 0 {
			return 1, fmt.Errorf("%s %s not found", c.Args[0], strings.Join(names, ", "))
		}
	}
	if sel := c.Flags["selector"]; sel != "" {
		found = slices.DeleteFunc(found, func(o cluster.Object) bool { return !selects(sel, o.GetLabels()) })
	}
	switch out := c.Flags["output"]; out {
	case "yaml", "json":
		return 0, c.encode(found, out, len(c.Args) == 2)
	case "name":
		for _, o := range found {
			c.w.Printf("%s/%s\n", strings.ToLower(cluster.KindOf(o)), o.GetName())
		}
		return 0, nil
	case "", "wide":
		if len(found) == 0 {
			c.w.Errorf("No resources found.")
			return 0, nil
		}
		c.table(found, out == "wide", ns == "")
		return 0, nil
	default:
		return 2, fmt.Errorf("-o %s: want yaml, json, name or wide", out)
	}
}

func selects(selector string, labels map[string]string) bool {
	for term := range strings.SplitSeq(selector, ",") {
		k, v, eq := strings.Cut(term, "=")
		if got, ok := labels[k]; !ok || eq && got != v {
			return false
		}
	}
	return true
}

func (c *call) encode(objects []cluster.Object, format string, single bool) error {
	var trees []any
	for _, o := range objects {
		t, err := cluster.Tree(o)
		if err != nil {
			return err
		}
		trees = append(trees, t)
	}
	var v any = map[string]any{"apiVersion": "v1", "kind": "List", "items": trees}
	if single && len(trees) == 1 {
		v = trees[0]
	}
	if format == "yaml" {
		b, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		c.w.Printf("%s", b)
		return nil
	}
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	c.w.Printf("%s\n", b)
	return nil
}

// table prints one table per kind.
func (c *call) table(objects []cluster.Object, wide, withNS bool) {
	last := ""
	t := tabwriter.NewWriter(c.w, 0, 0, 3, ' ', 0)
	defer t.Flush()
	for _, o := range objects {
		kind := cluster.KindOf(o)
		head, row := columns(o, wide)
		if withNS && o.GetNamespace() != "" {
			head, row = append([]string{"NAMESPACE"}, head...), append([]string{o.GetNamespace()}, row...)
		}
		if kind != last {
			fmt.Fprintln(t, strings.Join(head, "\t"))
			last = kind
		}
		fmt.Fprintln(t, strings.Join(row, "\t"))
	}
}

func columns(o cluster.Object, wide bool) (head, row []string) {
	add := func(h, v string) {
		if v == "" {
			v = "<none>"
		}
		head, row = append(head, h), append(row, v)
	}
	add("NAME", o.GetName())
	switch o := o.(type) {
	case *corev1.Pod:
		ready, restarts := 0, int32(0)
		for _, s := range o.Status.ContainerStatuses {
			if s.Ready {
				ready++
			}
			restarts += s.RestartCount
		}
		add("READY", fmt.Sprintf("%d/%d", ready, len(o.Spec.Containers)))
		add("STATUS", podStatus(o))
		add("RESTARTS", fmt.Sprint(restarts))
		add("MESH", o.Annotations[mesh.Redirection])
		if wide {
			add("IP", o.Status.PodIP)
			add("NODE", o.Spec.NodeName)
			add("SERVICEACCOUNT", o.Spec.ServiceAccountName)
		}
	case *corev1.Service:
		add("TYPE", string(o.Spec.Type))
		add("CLUSTER-IP", o.Spec.ClusterIP)
		var ports []string
		for _, p := range o.Spec.Ports {
			ports = append(ports, fmt.Sprintf("%d/%s", p.Port, p.Protocol))
		}
		add("PORT(S)", strings.Join(ports, ","))
		if wide {
			add("CLUSTER-IPS", strings.Join(o.Spec.ClusterIPs, ","))
		}
	case *corev1.Namespace:
		add("STATUS", "Active")
		add("MESH", o.Labels[mesh.ModeLabel])
	case *corev1.Node:
		add("STATUS", "Ready")
		if wide && len(o.Status.Addresses) > 0 {
			add("INTERNAL-IP", o.Status.Addresses[0].Address)
			add("PODS", o.Spec.PodCIDR)
		}
	case *appsv1.Deployment:
		add("READY", fmt.Sprintf("%d/%d", o.Status.ReadyReplicas, o.Status.Replicas))
	case *appsv1.StatefulSet:
		add("READY", fmt.Sprintf("%d/%d", o.Status.ReadyReplicas, o.Status.Replicas))
	}
	add("AGE", time.Since(o.GetCreationTimestamp().Time).Truncate(time.Second).String())
	return head, row
}

func podStatus(p *corev1.Pod) string {
	if p.DeletionTimestamp != nil {
		return "Terminating"
	}
	for _, s := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if s.State.Waiting != nil && s.State.Waiting.Reason != "" {
			return s.State.Waiting.Reason
		}
	}
	if p.Status.Phase == "" {
		return "Pending"
	}
	return string(p.Status.Phase)
}

// wait blocks until all pods of a namespace (or of all) are ready.
func (c *call) wait(ctx context.Context) (int, error) {
	ns := c.ns()
	if c.Flags["all-namespaces"] != "" {
		ns = ""
	}
	timeout := 60 * time.Second
	if t, err := time.ParseDuration(c.Flags["timeout"]); err == nil {
		timeout = t
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	wakec, stop := c.app.store.Watch()
	defer stop()
	for {
		waiting := c.app.waiting(ns)
		var again <-chan time.Time
		if len(waiting) == 0 {
			// What nodes translate and proxies know is nothing that the store tells.
			waiting, again = c.app.unsettled(ctx, ns), time.After(20*time.Millisecond)
		}
		if len(waiting) == 0 {
			return 0, nil
		}
		select {
		case <-wakec:
		case <-again:
		case <-ctx.Done():
			return 1, fmt.Errorf("not ready after %s:\n  %s", timeout, strings.Join(waiting, "\n  "))
		}
	}
}

// unsettled says what pods that are ready cannot be called by yet: a call by the name
// of a service is to be answered when `wait` returns.
func (a *App) unsettled(ctx context.Context, ns string) []string {
	out := controller.Behind(a.store, ns)
	want := fabric.Ruleset(controller.VIPs(a.store))
	a.mu.Lock()
	if a.rules != want {
		out = append(out, "nodes do not translate all addresses of services yet")
	}
	a.mu.Unlock()
	if len(out) == 0 && a.mesh != nil {
		out = a.mesh.Unaware(ctx, ns)
	}
	return out
}

// waiting says which pods are not as declared yet, and why.
func (a *App) waiting(ns string) []string {
	var out []string
	for _, d := range cluster.List[*appsv1.Deployment](a.store, ns) {
		want := int32(1)
		if d.Spec.Replicas != nil {
			want = *d.Spec.Replicas
		}
		if d.Status.ReadyReplicas < want {
			out = append(out, fmt.Sprintf("deployment %s/%s: %d of %d ready", d.Namespace, d.Name, d.Status.ReadyReplicas, want))
		}
	}
	for _, d := range cluster.List[*appsv1.StatefulSet](a.store, ns) {
		want := int32(1)
		if d.Spec.Replicas != nil {
			want = *d.Spec.Replicas
		}
		if d.Status.ReadyReplicas < want {
			out = append(out, fmt.Sprintf("statefulset %s/%s: %d of %d ready", d.Namespace, d.Name, d.Status.ReadyReplicas, want))
		}
	}
	for _, p := range cluster.List[*corev1.Pod](a.store, ns) {
		if p.Annotations[kubelet.Managed] != "" || p.Status.Phase == corev1.PodSucceeded {
			continue
		}
		if p.DeletionTimestamp == nil && !controller.Ready(p) {
			why := podStatus(p)
			for _, s := range p.Status.ContainerStatuses {
				if s.State.Waiting != nil {
					why += ": " + s.State.Waiting.Message
				}
			}
			out = append(out, fmt.Sprintf("pod %s/%s: %s", p.Namespace, p.Name, why))
		} else if want := a.mesh != nil && mesh.Enrolled(a.store, p); a.mesh != nil && want != (p.Annotations[mesh.Redirection] == "enabled") {
			out = append(out, fmt.Sprintf("pod %s/%s: redirection is %q, enrolment wanted: %t", p.Namespace, p.Name, p.Annotations[mesh.Redirection], want))
		}
	}
	return out
}

// componentStatus is one line of status.
type componentStatus struct {
	Name     string `json:"name"`
	Ready    bool   `json:"ready"`
	Reason   string `json:"reason,omitempty"`
	Pid      int    `json:"pid"`
	Restarts int    `json:"restarts"`
}

// labStatus is what `status -o json` prints.
type labStatus struct {
	Name       string              `json:"name"`
	Mode       string              `json:"mode"`
	Up         string              `json:"up"`
	Pid        int                 `json:"pid"`
	Nodes      []string            `json:"nodes"`
	Pods       map[string]int      `json:"pods"`
	Enrolled   int                 `json:"enrolled"`
	Redirect   []mesh.NodeRedirect `json:"redirect,omitempty"`
	Components []componentStatus   `json:"components"`
	Problems   []string            `json:"problems"`
	Fault      string              `json:"fault,omitempty"`
	Directory  string              `json:"directory"`
}

func (c *call) status(ctx context.Context) (int, error) {
	a := c.app
	s := labStatus{Name: a.Name, Mode: a.Mode, Up: time.Since(a.started).Truncate(time.Second).String(), Pid: os.Getpid(),
		Nodes: a.nodeNames(), Pods: map[string]int{}, Components: []componentStatus{}, Problems: []string{}, Directory: "/run/ambit-lab"}
	for _, p := range cluster.List[*corev1.Pod](a.store, "") {
		if p.Annotations[kubelet.Managed] == "" {
			s.Pods[podStatus(p)]++
		}
		if p.Annotations[mesh.Redirection] == "enabled" {
			s.Enrolled++
		}
	}
	if a.mesh != nil {
		s.Redirect = a.mesh.Redirections()
		for _, comp := range a.mesh.Components() {
			err := comp.Check(ctx)
			cs := componentStatus{Name: comp.Name, Ready: err == nil, Pid: comp.Pid(), Restarts: comp.Restarts()}
			if err != nil {
				cs.Reason = err.Error()
			}
			s.Components = append(s.Components, cs)
		}
		problems, err := a.mesh.Problems(ctx)
		for _, p := range problems {
			s.Problems = append(s.Problems, p.String())
		}
		if err != nil {
			s.Problems = append(s.Problems, "ambitd: "+err.Error())
		}
	}
	if err := a.lastFault(); err != nil {
		s.Fault = err.Error()
	}
	if c.Flags["output"] == "json" {
		b, err := json.MarshalIndent(s, "", "  ")
		if err != nil {
			return 1, err
		}
		c.w.Printf("%s\n", b)
		return 0, nil
	}
	c.w.Printf("lab %q (%s), up %s: nodes %s; pods: %s, %d in the mesh\n", s.Name, s.Mode, s.Up, strings.Join(s.Nodes, " "), phases(s.Pods), s.Enrolled)
	for _, group := range redirections(s.Redirect) {
		c.w.Printf("  connections of pods are captured with %s\n", group)
	}
	t := tabwriter.NewWriter(c.w, 0, 0, 3, ' ', 0)
	for _, cs := range s.Components {
		state := "ready"
		if !cs.Ready {
			state = "not ready: " + cs.Reason
		}
		fmt.Fprintf(t, "  %s\tpid %d\trestarts %d\t%s\n", cs.Name, cs.Pid, cs.Restarts, state)
	}
	_ = t.Flush() // to the caller, who may be gone
	for _, p := range s.Problems {
		c.w.Printf("  problem: %s\n", p)
	}
	if s.Fault != "" {
		c.w.Printf("  FAULT: %s\n", s.Fault)
	}
	return 0, nil
}

// redirections are one line for all nodes, unless they differ.
func redirections(all []mesh.NodeRedirect) (lines []string) {
	nodes := map[string][]string{}
	for _, r := range all {
		what := cmp.Or(r.Redirector, "nothing yet")
		if r.Reason != "" {
			what += ": " + r.Reason
		}
		nodes[what] = append(nodes[what], r.Node)
	}
	for _, what := range slices.Sorted(maps.Keys(nodes)) {
		line := what
		if len(nodes) > 1 {
			line += " (" + strings.Join(nodes[what], ", ") + ")"
		}
		lines = append(lines, line)
	}
	return lines
}

// phases is "3 Running, 1 Pending" for people.
func phases(pods map[string]int) string {
	if len(pods) == 0 {
		return "none"
	}
	var parts []string
	for _, phase := range slices.Sorted(maps.Keys(pods)) {
		parts = append(parts, fmt.Sprintf("%d %s", pods[phase], phase))
	}
	return strings.Join(parts, ", ")
}
