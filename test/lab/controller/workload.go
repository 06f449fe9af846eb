package controller

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
)

// The labels by which controllers know the template a pod was made from.
const (
	templateHash = "pod-template-hash"
	revisionHash = "controller-revision-hash"
)

func (c *Controller) workloads() error {
	var errs []error
	for _, d := range cluster.List[*appsv1.Deployment](c.Store, "") {
		errs = append(errs, c.deployment(d))
	}
	for _, r := range cluster.List[*appsv1.ReplicaSet](c.Store, "") {
		errs = append(errs, c.replicaSet(r))
	}
	for _, s := range cluster.List[*appsv1.StatefulSet](c.Store, "") {
		errs = append(errs, c.statefulSet(s))
	}
	for _, d := range cluster.List[*appsv1.DaemonSet](c.Store, "") {
		errs = append(errs, c.daemonSet(d))
	}
	for _, j := range cluster.List[*batchv1.Job](c.Store, "") {
		errs = append(errs, c.job(j))
	}
	return errors.Join(errs...)
}

// hashOf names a pod template.
func hashOf(t corev1.PodTemplateSpec) string {
	b, err := json.Marshal(t)
	if err != nil {
		panic("BUG: pod template does not encode: " + err.Error())
	}
	return short(string(b))
}

// owned returns the live pods an object controls.
func (c *Controller) owned(o metav1.Object) []*corev1.Pod {
	return slices.DeleteFunc(cluster.List[*corev1.Pod](c.Store, o.GetNamespace()), func(p *corev1.Pod) bool {
		return !metav1.IsControlledBy(p, o) || p.DeletionTimestamp != nil
	})
}

// ownerRef points at the object that controls.
func ownerRef(o cluster.Object) []metav1.OwnerReference {
	yes := true
	apiVersion := ""
	for _, k := range cluster.Kinds {
		if k.Name == cluster.KindOf(o) {
			apiVersion = k.APIVersion
		}
	}
	return []metav1.OwnerReference{{APIVersion: apiVersion, Kind: cluster.KindOf(o), Name: o.GetName(), UID: o.GetUID(), Controller: &yes, BlockOwnerDeletion: &yes}}
}

// pod makes a pod from a template.
func (c *Controller) pod(owner cluster.Object, t corev1.PodTemplateSpec, name string, labels map[string]string, change func(*corev1.Pod)) error {
	p := &corev1.Pod{ObjectMeta: *t.ObjectMeta.DeepCopy(), Spec: *t.Spec.DeepCopy()}
	p.Namespace, p.Name, p.OwnerReferences = owner.GetNamespace(), name, ownerRef(owner)
	if p.Labels == nil {
		p.Labels = map[string]string{}
	}
	maps.Copy(p.Labels, labels)
	if change != nil {
		change(p)
	}
	return c.Store.Put(p)
}

// deployment keeps the ReplicaSet of the current template and drops those of
// older ones when the current one is ready.
func (c *Controller) deployment(d *appsv1.Deployment) error {
	hash := hashOf(d.Spec.Template)
	replicas := int32(1)
	if d.Spec.Replicas != nil {
		replicas = *d.Spec.Replicas
	}
	current := d.Name + "-" + hash
	var errs []error
	if r, ok := cluster.Get[*appsv1.ReplicaSet](c.Store, d.Namespace, current); !ok || *r.Spec.Replicas != replicas {
		t := *d.Spec.Template.DeepCopy()
		if t.Labels == nil {
			t.Labels = map[string]string{}
		}
		t.Labels[templateHash] = hash
		errs = append(errs, c.Store.Put(&appsv1.ReplicaSet{
			ObjectMeta: metav1.ObjectMeta{Namespace: d.Namespace, Name: current, Labels: t.Labels, OwnerReferences: ownerRef(d)},
			Spec:       appsv1.ReplicaSetSpec{Replicas: &replicas, Selector: d.Spec.Selector, Template: t},
		}))
	}
	ready := int32(0)
	for _, r := range cluster.List[*appsv1.ReplicaSet](c.Store, d.Namespace) {
		if r.Name == current {
			ready = r.Status.ReadyReplicas
		}
	}
	for _, r := range cluster.List[*appsv1.ReplicaSet](c.Store, d.Namespace) {
		if metav1.IsControlledBy(r, d) && r.Name != current && ready >= replicas {
			errs = append(errs, c.Store.Delete(cluster.KeyOf(r)))
		}
	}
	errs = append(errs, cluster.Update(c.Store, d.Namespace, d.Name, func(d *appsv1.Deployment) bool {
		d.Status = appsv1.DeploymentStatus{Replicas: replicas, ReadyReplicas: ready, AvailableReplicas: ready, UpdatedReplicas: ready}
		return true
	}))
	return errors.Join(errs...)
}

func (c *Controller) replicaSet(r *appsv1.ReplicaSet) error {
	want := 1
	if r.Spec.Replicas != nil {
		want = int(*r.Spec.Replicas)
	}
	pods := c.owned(r)
	var errs []error
	ready := int32(0)
	pods = slices.DeleteFunc(pods, func(p *corev1.Pod) bool {
		if Ready(p) {
			ready++
		}
		if p.Status.Phase == corev1.PodFailed || p.Status.Phase == corev1.PodSucceeded {
			errs = append(errs, c.Store.Delete(cluster.KeyOf(p)))
			return true
		}
		return false
	})
	// Those that are not ready go first when there are too many.
	slices.SortStableFunc(pods, func(a, b *corev1.Pod) int {
		if Ready(a) == Ready(b) {
			return 0
		}
		if Ready(a) {
			return -1
		}
		return 1
	})
	for i := len(pods); i < want; i++ {
		errs = append(errs, c.pod(r, r.Spec.Template, r.Name+"-"+c.suffix(r, i), nil, nil))
	}
	for i := want; i < len(pods); i++ {
		errs = append(errs, c.Store.Delete(cluster.KeyOf(pods[i])))
	}
	errs = append(errs, cluster.Update(c.Store, r.Namespace, r.Name, func(r *appsv1.ReplicaSet) bool {
		r.Status = appsv1.ReplicaSetStatus{Replicas: int32(len(pods)), ReadyReplicas: ready}
		return true
	}))
	return errors.Join(errs...)
}

// suffix finds five letters that no pod of the set has.
func (c *Controller) suffix(o cluster.Object, i int) string {
	for n := i; ; n++ {
		s := short(fmt.Sprintf("%s %s %d", o.GetUID(), o.GetResourceVersion(), n))[:5]
		if _, taken := c.Store.Get(cluster.Key{Kind: "Pod", Namespace: o.GetNamespace(), Name: o.GetName() + "-" + s}); !taken {
			return s
		}
	}
}

// statefulSet makes its pods one after the other and replaces those of another
// template from the last to the first.
func (c *Controller) statefulSet(s *appsv1.StatefulSet) error {
	want := 1
	if s.Spec.Replicas != nil {
		want = int(*s.Spec.Replicas)
	}
	hash := hashOf(s.Spec.Template)
	parallel := s.Spec.PodManagementPolicy == appsv1.ParallelPodManagement
	var errs []error
	ready := int32(0)
	for i := range want {
		name := fmt.Sprintf("%s-%d", s.Name, i)
		p, ok := cluster.Get[*corev1.Pod](c.Store, s.Namespace, name)
		if !ok {
			labels := map[string]string{revisionHash: s.Name + "-" + hash, "statefulset.kubernetes.io/pod-name": name, "apps.kubernetes.io/pod-index": fmt.Sprint(i)}
			errs = append(errs, c.pod(s, s.Spec.Template, name, labels, func(p *corev1.Pod) {
				p.Spec.Hostname, p.Spec.Subdomain = name, s.Spec.ServiceName
			}))
		}
		if ok && Ready(p) {
			ready++
		} else if !parallel {
			break
		}
	}
	pods := c.owned(s)
	for _, p := range slices.Backward(pods) {
		n := 0
		if _, err := fmt.Sscanf(strings.TrimPrefix(p.Name, s.Name+"-"), "%d", &n); err != nil || n >= want ||
			p.Labels[revisionHash] != s.Name+"-"+hash && (int(ready) == want || !Ready(p)) {
			errs = append(errs, c.Store.Delete(cluster.KeyOf(p)))
			break
		}
	}
	errs = append(errs, cluster.Update(c.Store, s.Namespace, s.Name, func(s *appsv1.StatefulSet) bool {
		s.Status = appsv1.StatefulSetStatus{Replicas: int32(len(pods)), ReadyReplicas: ready}
		return true
	}))
	return errors.Join(errs...)
}

func (c *Controller) daemonSet(d *appsv1.DaemonSet) error {
	hash := hashOf(d.Spec.Template)
	var errs []error
	byNode := map[string]*corev1.Pod{}
	ready, wanted := int32(0), int32(0)
	for _, p := range c.owned(d) {
		if p.Labels[revisionHash] != hash {
			errs = append(errs, c.Store.Delete(cluster.KeyOf(p)))
			continue
		}
		byNode[p.Spec.NodeName] = p
		if Ready(p) {
			ready++
		}
	}
	for _, name := range c.Nodes {
		node, ok := cluster.Get[*corev1.Node](c.Store, "", name)
		if !ok || !contains(node.Labels, d.Spec.Template.Spec.NodeSelector) {
			continue
		}
		wanted++
		if byNode[name] == nil {
			errs = append(errs, c.pod(d, d.Spec.Template, d.Name+"-"+short(hash + name + d.ResourceVersion)[:5],
				map[string]string{revisionHash: hash}, func(p *corev1.Pod) { p.Spec.NodeName = name }))
		}
	}
	errs = append(errs, cluster.Update(c.Store, d.Namespace, d.Name, func(d *appsv1.DaemonSet) bool {
		d.Status = appsv1.DaemonSetStatus{DesiredNumberScheduled: wanted, CurrentNumberScheduled: wanted, NumberReady: ready}
		return true
	}))
	return errors.Join(errs...)
}

func (c *Controller) job(j *batchv1.Job) error {
	completions, parallelism, limit := int32(1), int32(1), int32(6)
	for from, to := range map[*int32]*int32{j.Spec.Completions: &completions, j.Spec.Parallelism: &parallelism, j.Spec.BackoffLimit: &limit} {
		if from != nil {
			*to = *from
		}
	}
	var active, succeeded, failed int32
	for _, p := range c.owned(j) {
		switch p.Status.Phase {
		case corev1.PodSucceeded:
			succeeded++
		case corev1.PodFailed:
			failed++
		default:
			active++
		}
	}
	var errs []error
	for n := active; succeeded+n < completions && n < parallelism && failed <= limit; n++ {
		errs = append(errs, c.pod(j, j.Spec.Template, j.Name+"-"+c.suffix(j, int(succeeded+failed+n)),
			map[string]string{"job-name": j.Name, "batch.kubernetes.io/job-name": j.Name}, nil))
	}
	errs = append(errs, cluster.Update(c.Store, j.Namespace, j.Name, func(j *batchv1.Job) bool {
		j.Status.Active, j.Status.Succeeded, j.Status.Failed = active, succeeded, failed
		return true
	}))
	return errors.Join(errs...)
}
