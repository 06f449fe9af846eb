// Package controller plays the controllers that plain Kubernetes YAML relies on:
// Deployment, ReplicaSet, StatefulSet, DaemonSet and Job make Pods; Pods get a
// node; Services get addresses and EndpointSlices; namespaces get a default
// ServiceAccount; what lost its owner goes.
//
// One goroutine (Run) looks at the whole store after each change and moves it a
// step towards what is declared, until nothing changes any more. A lab has some
// hundred objects, so looking at all of them is cheaper than being clever.
package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
)

// Config is what a Controller needs.
type Config struct {
	Store *cluster.Store
	Nodes []string // in the order in which pods are spread
	IPv6  bool
	Log   *slog.Logger
}

// Controller runs all of them.
type Controller struct {
	Config
	turn int // the node that is next; owned by Run
}

// New returns a Controller.
func New(cfg Config) *Controller { return &Controller{Config: cfg} }

// Run reconciles until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	wakec, stop := c.Store.Watch()
	defer stop()
	for {
		select {
		case <-wakec:
			if err := c.Reconcile(); err != nil {
				c.Log.Warn("reconcile", "err", err)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// Reconcile takes one step.
func (c *Controller) Reconcile() error {
	return errors.Join(c.namespaces(), c.workloads(), c.orphans(), c.schedule(), c.services(), c.endpoints())
}

func (c *Controller) namespaces() error {
	var errs []error
	for _, ns := range cluster.List[*corev1.Namespace](c.Store, "") {
		if _, ok := cluster.Get[*corev1.ServiceAccount](c.Store, ns.Name, "default"); !ok {
			errs = append(errs, c.Store.Put(&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: ns.Name, Name: "default"}}))
		}
	}
	return errors.Join(errs...)
}

// orphans removes what is controlled by something that no longer exists.
func (c *Controller) orphans() error {
	var errs []error
	for _, kind := range []string{"ReplicaSet", "Pod", "EndpointSlice"} {
		for _, o := range c.Store.List(kind, "") {
			ref := metav1.GetControllerOf(o)
			if ref == nil || o.GetDeletionTimestamp() != nil {
				continue
			}
			owner, ok := c.Store.Get(cluster.Key{Kind: ref.Kind, Namespace: o.GetNamespace(), Name: ref.Name})
			if !ok && ref.Kind == "Node" { // static pods
				continue
			}
			if !ok || owner.GetUID() != ref.UID {
				errs = append(errs, c.Store.Delete(cluster.KeyOf(o)))
			}
		}
	}
	return errors.Join(errs...)
}

// schedule gives pods without a node the next one that their selector allows.
func (c *Controller) schedule() error {
	var errs []error
	for _, p := range cluster.List[*corev1.Pod](c.Store, "") {
		if p.Spec.NodeName != "" || p.DeletionTimestamp != nil {
			continue
		}
		node := c.pick(p)
		errs = append(errs, cluster.Update(c.Store, p.Namespace, p.Name, func(p *corev1.Pod) bool {
			p.Status.Phase = corev1.PodPending
			if node == "" {
				setCondition(p, corev1.PodScheduled, corev1.ConditionFalse, "Unschedulable", fmt.Sprintf("no node matches nodeSelector %v", p.Spec.NodeSelector))
				return true
			}
			p.Spec.NodeName = node
			setCondition(p, corev1.PodScheduled, corev1.ConditionTrue, "", "")
			return true
		}))
	}
	return errors.Join(errs...)
}

// pick chooses the node with the fewest pods of the same owner, so that replicas
// spread, and takes nodes in turn where that leaves a choice.
func (c *Controller) pick(p *corev1.Pod) string {
	owner := metav1.GetControllerOf(p)
	load := map[string]int{}
	for _, q := range cluster.List[*corev1.Pod](c.Store, p.Namespace) {
		if o := metav1.GetControllerOf(q); owner != nil && o != nil && o.UID == owner.UID {
			load[q.Spec.NodeName]++
		}
	}
	best := ""
	for i := range c.Nodes {
		name := c.Nodes[(c.turn+i)%len(c.Nodes)]
		node, ok := cluster.Get[*corev1.Node](c.Store, "", name)
		if !ok || !contains(node.Labels, p.Spec.NodeSelector) {
			continue
		}
		if best == "" || load[name] < load[best] {
			best = name
		}
	}
	if best != "" {
		c.turn = (slices.Index(c.Nodes, best) + 1) % len(c.Nodes)
	}
	return best
}

func setCondition(p *corev1.Pod, t corev1.PodConditionType, s corev1.ConditionStatus, reason, message string) {
	i := slices.IndexFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == t })
	if i < 0 {
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: t})
		i = len(p.Status.Conditions) - 1
	}
	c := &p.Status.Conditions[i]
	if c.Status != s {
		c.LastTransitionTime = metav1.Now()
	}
	c.Status, c.Reason, c.Message = s, reason, message
}

// contains reports whether labels has all of want.
func contains(labels, want map[string]string) bool {
	for k, v := range want {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// Ready reports a pod's Ready condition.
func Ready(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// short is a hash as Kubernetes puts it into names.
func short(text string) string {
	h := fnv.New64a()
	_, _ = h.Write([]byte(text)) // never fails
	const letters = "bcdfghjklmnpqrstvwxz2456789"
	v := h.Sum64()
	b := make([]byte, 9)
	for i := range b {
		b[i] = letters[v%uint64(len(letters))]
		v /= uint64(len(letters))
	}
	return string(b)
}

// Networks of service addresses.
var (
	serviceNet4 = netip.MustParsePrefix("10.96.0.0/16")
	serviceNet6 = netip.MustParsePrefix("fd00:10:96::/112")
)

// DNSAddr is the address of the cluster DNS.
var DNSAddr = netip.MustParseAddr("10.96.0.10")

// services gives addresses to Services that want one.
func (c *Controller) services() error {
	all := cluster.List[*corev1.Service](c.Store, "")
	used := map[string]bool{DNSAddr.String(): true}
	for _, s := range all {
		for _, ip := range s.Spec.ClusterIPs {
			used[ip] = true
		}
	}
	var errs []error
	for _, s := range all {
		if s.Spec.Type == corev1.ServiceTypeExternalName || len(s.Spec.ClusterIPs) > 0 && s.Spec.ClusterIP != "" {
			continue
		}
		errs = append(errs, cluster.Update(c.Store, s.Namespace, s.Name, func(s *corev1.Service) bool {
			complete(s, c.families(s))
			if s.Spec.ClusterIP == corev1.ClusterIPNone {
				s.Spec.ClusterIPs = []string{corev1.ClusterIPNone}
				return true
			}
			s.Spec.ClusterIPs = nil
			for i, f := range s.Spec.IPFamilies {
				if i == 0 && s.Spec.ClusterIP != "" {
					s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, s.Spec.ClusterIP)
					continue
				}
				s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, allocate(f, s.Namespace+"/"+s.Name, used))
			}
			s.Spec.ClusterIP = s.Spec.ClusterIPs[0]
			return true
		}))
	}
	return errors.Join(errs...)
}

// families are those a Service asks for; both where it leaves it open, as the lab
// is dual stack and everything should be tried with both.
func (c *Controller) families(s *corev1.Service) []corev1.IPFamily {
	if len(s.Spec.IPFamilies) > 0 {
		return s.Spec.IPFamilies
	}
	if a, err := netip.ParseAddr(s.Spec.ClusterIP); err == nil && a.Is6() {
		return []corev1.IPFamily{corev1.IPv6Protocol}
	}
	single := s.Spec.IPFamilyPolicy != nil && *s.Spec.IPFamilyPolicy == corev1.IPFamilyPolicySingleStack
	if !c.IPv6 || single {
		return []corev1.IPFamily{corev1.IPv4Protocol}
	}
	return []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
}

// complete fills in the defaults of an API server.
func complete(s *corev1.Service, families []corev1.IPFamily) {
	if s.Spec.Type == "" {
		s.Spec.Type = corev1.ServiceTypeClusterIP
	}
	s.Spec.IPFamilies = families
	if s.Spec.IPFamilyPolicy == nil {
		p := corev1.IPFamilyPolicySingleStack
		if len(families) == 2 {
			p = corev1.IPFamilyPolicyPreferDualStack
		}
		s.Spec.IPFamilyPolicy = &p
	}
	for i := range s.Spec.Ports {
		p := &s.Spec.Ports[i]
		p.Protocol = cmp.Or(p.Protocol, corev1.ProtocolTCP)
		if p.TargetPort.IntVal == 0 && p.TargetPort.StrVal == "" {
			p.TargetPort.IntVal = p.Port
		}
	}
}

// allocate finds a free address, the same one for the same service name in each
// run, which makes what people see and copy repeatable.
func allocate(f corev1.IPFamily, name string, used map[string]bool) string {
	h := fnv.New32a()
	_, _ = h.Write([]byte(name)) // never fails
	for n := h.Sum32(); ; n++ {
		hi, lo := byte(n>>8), byte(n)
		if lo == 0 || lo == 255 || hi == 0 { // the first 256 are for fixed addresses
			continue
		}
		p := serviceNet4
		if f == corev1.IPv6Protocol {
			p = serviceNet6
		}
		b := p.Addr().AsSlice()
		b[len(b)-2], b[len(b)-1] = hi, lo
		a, _ := netip.AddrFromSlice(b) // of the length it had
		if !used[a.String()] {
			used[a.String()] = true
			return a.String()
		}
	}
}
