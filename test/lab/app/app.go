// Package app is the lab's daemon: it puts the network, the cluster, the pods and
// the mesh together and answers the command line. This is the only place where
// the lab's parts meet.
package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
	"github.com/ambit-mesh/ambit/test/lab/control"
	"github.com/ambit-mesh/ambit/test/lab/controller"
	"github.com/ambit-mesh/ambit/test/lab/dns"
	"github.com/ambit-mesh/ambit/test/lab/fabric"
	"github.com/ambit-mesh/ambit/test/lab/kubelet"
	"github.com/ambit-mesh/ambit/test/lab/mesh"
	"github.com/ambit-mesh/ambit/test/lab/sandbox"
)

// Config is a lab's shape.
type Config struct {
	Name      string
	Mode      string // how the sandbox was made, for status
	Nodes     int
	NoMesh    bool
	Bin       string // directory of the programs
	SecretTTL time.Duration
	ZTunnel   map[string]string // by node: the program that is its ztunnel, where it is not ours
	Env       []string          // further variables for ztunnel
	Redirect  string            // ambit-node's --redirect
	NoEBPF    string            // why the kernel takes no programs from the lab; "" where it does
	Listener  *net.UnixListener
	Log       *slog.Logger
}

// App is the daemon.
type App struct {
	Config
	started time.Time
	store   *cluster.Store
	net     *fabric.Network
	kubelet *kubelet.Kubelet
	mesh    *mesh.Mesh // nil without one
	cancel  context.CancelCauseFunc

	mu     sync.Mutex
	fault  error         // why the lab ended or cannot become ready; guarded by mu
	rules  string        // the service translation that every node has; guarded by mu
	faultc chan struct{} // closed with fault
	readyc chan struct{} // closed when the lab is ready
}

// Directories inside the sandbox.
const (
	clusterDir = sandbox.RunDir + "/cluster"
	podsDir    = sandbox.RunDir + "/pods"
	meshDir    = sandbox.RunDir + "/mesh"
	bpfDir     = sandbox.RunDir + "/bpf"
	logsDir    = sandbox.RunDir + "/logs"
)

// errDown is the cause when a user ends the lab.
var errDown = errors.New("lab taken down")

// Run runs the lab until ctx ends or `down` is called.
func Run(ctx context.Context, cfg Config) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	a := &App{Config: cfg, started: time.Now(), cancel: cancel, faultc: make(chan struct{}), readyc: make(chan struct{})}
	if err := a.assemble(); err != nil {
		return err
	}
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel(nil)
	part := func(name string, run func(context.Context) error) {
		running.Go(func() {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				a.fail(fmt.Errorf("%s: %w", name, err))
			}
		})
	}
	part("control", func(ctx context.Context) error { return control.Serve(ctx, a.Listener, a.command) })
	part("controller", controller.New(controller.Config{Store: a.store, Nodes: a.nodeNames(), IPv6: a.net.IPv6, Log: a.Log}).Run)
	part("kubelet", a.kubelet.Run)
	part("services", a.translate)
	zone := &dns.Zone{Store: a.store}
	for _, n := range a.net.Nodes {
		part("dns on "+n.Name, func(ctx context.Context) error {
			return zone.Serve(ctx, n.NS, slices.Concat(n.Addrs, []netip.Addr{controller.DNSAddr}))
		})
	}
	if a.mesh != nil {
		part("mesh", a.mesh.Run)
		running.Go(func() {
			select {
			case <-a.mesh.Ready():
				close(a.readyc)
			case <-ctx.Done():
			}
		})
	} else {
		close(a.readyc)
	}
	<-ctx.Done()
	if cause := context.Cause(ctx); !errors.Is(cause, errDown) && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// fail records a fault that the user has to know; the lab stays up for looking.
func (a *App) fail(err error) {
	a.Log.Error("fault", "err", err)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fault == nil {
		a.fault = err
		close(a.faultc)
	}
}

func (a *App) lastFault() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.fault
}

func (a *App) nodeNames() []string {
	var names []string
	for _, n := range a.net.Nodes {
		names = append(names, n.Name)
	}
	return names
}

// assemble makes everything that Run then runs.
func (a *App) assemble() error {
	var err error
	if a.store, err = cluster.New(clusterDir); err != nil {
		return err
	}
	if a.net, err = fabric.New(sandbox.NetNSDir, a.Nodes); err != nil {
		return err
	}
	for _, n := range a.net.Nodes {
		// The DNS address is the node's own, as with a node-local DNS cache.
		if err := n.Addr("lo", host(controller.DNSAddr)); err != nil {
			return err
		}
	}
	if err := a.seed(); err != nil {
		return err
	}
	k := kubelet.Config{Store: a.store, Net: a.net, Dir: podsDir, LogDir: logsDir, Sample: filepath.Join(a.Bin, "ambit-sample"), Path: toolPath(a.Bin), Log: a.Log}
	r := mesh.Redirect{Flag: a.Redirect, Root: sandbox.Cgroup(), BPF: bpfDir}
	if r.Root != "" {
		r.Pods, k.Cgroup = sandbox.PodsCgroup, sandbox.PodsCgroup
	}
	if !a.NoMesh {
		if r.Root != "" && a.NoEBPF == "" {
			if err := a.mountBPF(); err != nil {
				return err
			}
		}
		a.mesh, err = mesh.New(mesh.Config{Store: a.store, Net: a.net, Bin: a.Bin, Dir: meshDir, Source: clusterDir, LogDir: logsDir, SecretTTL: a.SecretTTL,
			ZTunnel: a.ZTunnel, Env: a.Env, Redirect: r, Log: a.Log})
		if err != nil {
			return err
		}
		k.Admit, k.CNI = a.mesh.Admit, a.mesh.CNI
	}
	a.kubelet = kubelet.New(k)
	return nil
}

// mountBPF gives each node a BPF file system. With the sandbox's mounts, what is
// pinned there goes too.
func (a *App) mountBPF() error {
	for _, n := range a.net.Nodes {
		dir := filepath.Join(bpfDir, n.Name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("bpffs", dir, "bpf", 0, "mode=0700"); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	return nil
}

// toolPath finds the machine's tools, of root too, and the lab's own programs.
func toolPath(bin string) string {
	return os.Getenv("PATH") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:" + bin
}

// seed writes the objects a new cluster has.
func (a *App) seed() error {
	var errs []error
	for _, name := range []string{"default", "kube-system", mesh.Namespace} {
		errs = append(errs, a.store.Put(&corev1.Namespace{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/metadata.name": name}},
			Status:     corev1.NamespaceStatus{Phase: corev1.NamespaceActive}}))
	}
	for i, m := range append([]*fabric.Machine{a.net.Control}, a.net.Nodes...) {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: m.Name, Labels: map[string]string{
			"kubernetes.io/hostname": m.Name, "kubernetes.io/os": "linux",
			"topology.kubernetes.io/region": "lab", "topology.kubernetes.io/zone": fmt.Sprintf("zone-%d", max(i, 1))}}}
		if m == a.net.Control {
			n.Labels["node-role.kubernetes.io/control-plane"] = ""
			n.Spec.Taints = []corev1.Taint{{Key: "node-role.kubernetes.io/control-plane", Effect: corev1.TaintEffectNoSchedule}}
		}
		for _, p := range m.PodNets {
			n.Spec.PodCIDRs = append(n.Spec.PodCIDRs, p.String())
		}
		if len(n.Spec.PodCIDRs) > 0 {
			n.Spec.PodCIDR = n.Spec.PodCIDRs[0]
		}
		for _, addr := range m.Addrs {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: addr.String()})
		}
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "LabReady"}}
		n.Status.Allocatable = corev1.ResourceList{corev1.ResourcePods: resource.MustParse("253")}
		errs = append(errs, a.store.Put(n))
	}
	errs = append(errs, a.seedDNS())
	return errors.Join(errs...)
}

// seedDNS writes the Service of the cluster DNS, whose endpoints are the nodes.
func (a *App) seedDNS() error {
	ip := controller.DNSAddr.String()
	single := corev1.IPFamilyPolicySingleStack
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "kube-dns", Labels: map[string]string{"k8s-app": "kube-dns"}},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip}, IPFamilyPolicy: &single,
			IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports: []corev1.ServicePort{
				{Name: "dns", Protocol: corev1.ProtocolUDP, Port: 53}, {Name: "dns-tcp", Protocol: corev1.ProtocolTCP, Port: 53}}},
	}
	port, ready := int32(53), true
	e := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "kube-system", Name: "kube-dns-ipv4", Labels: map[string]string{discoveryv1.LabelServiceName: "kube-dns"}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for i := range svc.Spec.Ports {
		p := &svc.Spec.Ports[i]
		p.TargetPort.IntVal = port
		e.Ports = append(e.Ports, discoveryv1.EndpointPort{Name: &p.Name, Protocol: &p.Protocol, Port: &port})
	}
	for _, n := range a.net.Nodes {
		name := n.Name
		e.Endpoints = append(e.Endpoints, discoveryv1.Endpoint{Addresses: []string{n.Addrs[0].String()}, NodeName: &name, Conditions: discoveryv1.EndpointConditions{Ready: &ready}})
	}
	return errors.Join(a.store.Put(svc), a.store.Put(e))
}

// translate keeps every node's service translation like the store.
func (a *App) translate(ctx context.Context) error {
	wakec, stop := a.store.Watch()
	defer stop()
	last := ""
	for {
		select {
		case <-wakec:
		case <-ctx.Done():
			return nil
		}
		vips := controller.VIPs(a.store)
		if rules := fabric.Ruleset(vips); rules == last {
			continue
		} else {
			last = rules
		}
		for _, m := range a.net.Nodes {
			if err := m.SetVIPs(ctx, vips); err != nil && ctx.Err() == nil {
				return err
			}
		}
		a.mu.Lock()
		a.rules = last
		a.mu.Unlock()
	}
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
