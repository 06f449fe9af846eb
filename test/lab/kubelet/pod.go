package kubelet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
	"github.com/ambit-mesh/ambit/test/lab/controller"
	"github.com/ambit-mesh/ambit/test/lab/dns"
	"github.com/ambit-mesh/ambit/test/lab/fabric"
	"github.com/ambit-mesh/ambit/test/lab/process"
)

// pod is one running pod. run owns it.
type pod struct {
	k       *Kubelet
	key     cluster.Key
	spec    *corev1.Pod // as it was when the pod started
	machine *fabric.Machine
	dir     string
	cancel  context.CancelFunc

	cgroup string // directory above its containers' cgroups; "": none

	net   *fabric.Pod  // nil with hostNetwork; set before placed
	addrs []netip.Addr // set before placed

	mu         sync.Mutex
	placed     bool         // has addresses and files; guarded by mu
	containers []*container // guarded by mu; init containers first
	initDone   bool         // guarded by mu
	finished   bool         // all containers are done for good; guarded by mu
}

// run takes the pod through its life: network, files, init containers,
// containers, and the way back.
func (p *pod) run(ctx context.Context) {
	for backoff := firstBackoff; ; backoff = min(2*backoff, lastBackoff) {
		err := p.place()
		if err == nil {
			break
		}
		p.k.Log.Warn("pod has no network yet", "pod", p.key.String(), "err", err)
		p.note(err)
		if !wait(ctx, backoff) {
			return
		}
	}
	defer p.leave()
	if !p.attach(ctx) {
		return
	}
	p.report()
	if p.k.Admit != nil {
		if err := p.k.Admit(ctx, p.key.Namespace, p.key.Name); err != nil {
			return
		}
	}
	for _, c := range p.all() {
		if !c.init {
			continue
		}
		if code := c.run(ctx); code != 0 || ctx.Err() != nil {
			p.finish(ctx)
			return
		}
	}
	p.mu.Lock()
	p.initDone = true
	p.mu.Unlock()
	p.report()
	var running sync.WaitGroup
	for _, c := range p.all() {
		if !c.init {
			running.Go(func() { c.run(ctx) })
		}
	}
	running.Wait()
	p.finish(ctx)
}

// finish keeps a pod whose containers ended by themselves until it is deleted.
func (p *pod) finish(ctx context.Context) {
	p.mu.Lock()
	p.finished = true
	p.mu.Unlock()
	p.report()
	<-ctx.Done()
}

func (p *pod) all() []*container {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.containers
}

func (p *pod) netns() string {
	if p.net == nil {
		return p.machine.Path()
	}
	return p.net.Path()
}

// place gives the pod addresses and files.
func (p *pod) place() error {
	if p.spec.Spec.HostNetwork {
		p.addrs = p.machine.Addrs
	} else {
		net, err := p.k.Net.AddPod(p.machine, p.key.Namespace+"."+p.key.Name)
		if err != nil {
			return err
		}
		p.net, p.addrs = net, net.Addrs
	}
	if err := p.files(); err != nil {
		p.leave()
		return err
	}
	p.spec.Spec.ServiceAccountName = cmp.Or(p.spec.Spec.ServiceAccountName, "default")
	p.spec.Spec.RestartPolicy = cmp.Or(p.spec.Spec.RestartPolicy, corev1.RestartPolicyAlways)
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.spec.Spec.InitContainers {
		p.containers = append(p.containers, newContainer(p, &p.spec.Spec.InitContainers[i], true))
	}
	for i := range p.spec.Spec.Containers {
		p.containers = append(p.containers, newContainer(p, &p.spec.Spec.Containers[i], false))
	}
	p.initDone = len(p.spec.Spec.InitContainers) == 0
	p.placed = true
	return nil
}

// attach has the CNI plugin let the pod start, however often that takes.
func (p *pod) attach(ctx context.Context) bool {
	if p.k.CNI == nil || p.net == nil {
		return true
	}
	for backoff := firstBackoff; ; backoff = min(2*backoff, lastBackoff) {
		err := p.k.CNI(ctx, "ADD", p.sandbox())
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		p.k.Log.Warn("pod does not start", "pod", p.key.String(), "err", err)
		p.note(err)
		p.detach() // as runtimes do with a sandbox that failed
		if !wait(ctx, backoff) {
			return false
		}
	}
}

func (p *pod) sandbox() Sandbox {
	return Sandbox{
		Node: p.machine.Name, Namespace: p.key.Namespace, Name: p.key.Name, UID: string(p.spec.UID),
		NetNS: p.net.Path(), Addrs: p.addrs,
	}
}

func (p *pod) detach() {
	if p.k.CNI == nil {
		return
	}
	if err := p.k.CNI(context.Background(), "DEL", p.sandbox()); err != nil {
		p.k.Log.Warn("CNI plugin's DEL", "pod", p.key.String(), "err", err)
	}
}

// leave gives back what place took. Processes are gone by then.
func (p *pod) leave() {
	if p.net != nil {
		p.detach()
		p.net.Remove()
	}
	process.RemoveCgroup(p.cgroup)
	_ = os.RemoveAll(p.dir) // in the lab's own memory; it goes with the lab anyway
}

func (p *pod) files() error {
	host := cmp.Or(p.spec.Spec.Hostname, p.key.Name)
	var hosts strings.Builder
	hosts.WriteString("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
	for _, a := range p.addrs {
		name := host
		if p.spec.Spec.Subdomain != "" {
			name = host + "." + p.spec.Spec.Subdomain + "." + p.key.Namespace + ".svc." + strings.TrimSuffix(dns.Domain, ".") + " " + host
		}
		fmt.Fprintf(&hosts, "%s %s\n", a, name)
	}
	for _, h := range p.spec.Spec.HostAliases {
		fmt.Fprintf(&hosts, "%s %s\n", h.IP, strings.Join(h.Hostnames, " "))
	}
	return errors.Join(os.MkdirAll(p.dir, 0o755),
		os.WriteFile(filepath.Join(p.dir, "resolv.conf"), []byte(dns.Conf(controller.DNSAddr, p.key.Namespace)), 0o644),
		os.WriteFile(filepath.Join(p.dir, "hosts"), []byte(hosts.String()), 0o644),
		os.WriteFile(filepath.Join(p.dir, "hostname"), []byte(host+"\n"), 0o644))
}

// volume returns the directory of a volume, made on first use.
func (p *pod) volume(name string) (string, error) {
	i := slices.IndexFunc(p.spec.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == name })
	if i < 0 {
		return "", fmt.Errorf("volume %q is not declared", name)
	}
	v := p.spec.Spec.Volumes[i]
	if v.HostPath != nil {
		return v.HostPath.Path, nil
	}
	dir := filepath.Join(p.dir, "volumes", name)
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return "", err
	}
	files := map[string][]byte{}
	switch {
	case v.ConfigMap != nil:
		cm, ok := cluster.Get[*corev1.ConfigMap](p.k.Store, p.key.Namespace, v.ConfigMap.Name)
		if !ok {
			return "", fmt.Errorf("volume %q: configmap %q not found", name, v.ConfigMap.Name)
		}
		for k, text := range cm.Data {
			files[k] = []byte(text)
		}
		for k, b := range cm.BinaryData {
			files[k] = b
		}
	case v.Secret != nil:
		sec, ok := cluster.Get[*corev1.Secret](p.k.Store, p.key.Namespace, v.Secret.SecretName)
		if !ok {
			return "", fmt.Errorf("volume %q: secret %q not found", name, v.Secret.SecretName)
		}
		for k, b := range sec.Data {
			files[k] = b
		}
		for k, text := range sec.StringData {
			files[k] = []byte(text)
		}
	}
	for k, b := range files {
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(k)), b, 0o644); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// note shows why a pod is waiting before it has containers.
func (p *pod) note(why error) {
	_ = cluster.Update(p.k.Store, p.key.Namespace, p.key.Name, func(o *corev1.Pod) bool { // a pod that is gone needs no note
		o.Status.Phase, o.Status.Reason, o.Status.Message = corev1.PodPending, "NetworkNotReady", why.Error()
		return o.UID == p.spec.UID
	})
}

// report writes the pod's status.
func (p *pod) report() {
	p.mu.Lock()
	initDone, finished := p.initDone, p.finished
	p.mu.Unlock()
	err := cluster.Update(p.k.Store, p.key.Namespace, p.key.Name, func(o *corev1.Pod) bool {
		if o.UID != p.spec.UID {
			return false
		}
		if !p.spec.Spec.HostNetwork {
			if o.Annotations == nil {
				o.Annotations = map[string]string{}
			}
			o.Annotations[NetNSAnnotation] = p.netns()
		}
		o.Spec.ServiceAccountName, o.Spec.RestartPolicy = p.spec.Spec.ServiceAccountName, p.spec.Spec.RestartPolicy
		p.status(&o.Status, initDone, finished)
		return true
	})
	if err != nil {
		p.k.Log.Debug("status not written", "err", err) // the pod was forgotten meanwhile
	}
}

func (p *pod) status(s *corev1.PodStatus, initDone, finished bool) {
	s.HostIP, s.HostIPs, s.PodIPs = p.machine.Addrs[0].String(), nil, nil
	for _, a := range p.machine.Addrs {
		s.HostIPs = append(s.HostIPs, corev1.HostIP{IP: a.String()})
	}
	for _, a := range p.addrs {
		s.PodIPs = append(s.PodIPs, corev1.PodIP{IP: a.String()})
	}
	s.PodIP = p.addrs[0].String()
	s.Reason, s.Message = "", ""
	if s.StartTime == nil {
		now := metav1.NewTime(time.Now().UTC().Truncate(time.Second))
		s.StartTime = &now
	}
	s.ContainerStatuses, s.InitContainerStatuses = nil, nil
	ready, started, failed := true, false, false
	var notReady []string
	for _, c := range p.all() {
		st := c.snapshot()
		if c.init {
			s.InitContainerStatuses = append(s.InitContainerStatuses, st)
		} else {
			s.ContainerStatuses = append(s.ContainerStatuses, st)
			started = started || st.State.Running != nil || st.RestartCount > 0
			if !st.Ready {
				ready, notReady = false, append(notReady, st.Name)
			}
		}
		failed = failed || st.State.Terminated != nil && st.State.Terminated.ExitCode != 0
	}
	switch {
	case finished && failed:
		s.Phase = corev1.PodFailed
	case finished:
		s.Phase = corev1.PodSucceeded
	case started:
		s.Phase = corev1.PodRunning
	case s.Phase == "":
		s.Phase = corev1.PodPending
	}
	why := ""
	if !ready {
		why = fmt.Sprintf("containers with unready status: %v", notReady)
	}
	condition(s, corev1.PodInitialized, initDone, "ContainersNotInitialized", "")
	condition(s, corev1.ContainersReady, ready, "ContainersNotReady", why)
	condition(s, corev1.PodReady, ready, "ContainersNotReady", why)
}

func condition(s *corev1.PodStatus, t corev1.PodConditionType, ok bool, reason, message string) {
	i := slices.IndexFunc(s.Conditions, func(c corev1.PodCondition) bool { return c.Type == t })
	if i < 0 {
		s.Conditions = append(s.Conditions, corev1.PodCondition{Type: t})
		i = len(s.Conditions) - 1
	}
	c := &s.Conditions[i]
	want := corev1.ConditionFalse
	if ok {
		want, reason, message = corev1.ConditionTrue, "", ""
	}
	if c.Status != want {
		c.LastTransitionTime = metav1.NewTime(time.Now().UTC().Truncate(time.Second))
	}
	c.Status, c.Reason, c.Message = want, reason, message
}
