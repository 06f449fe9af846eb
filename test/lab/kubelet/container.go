package kubelet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
	"github.com/ambit-mesh/ambit/test/lab/process"
)

// Restarts wait this long at first and twice as long each time, as Kubernetes
// does from 10 s to 5 min; here someone is watching.
const (
	firstBackoff = 500 * time.Millisecond
	lastBackoff  = 30 * time.Second
	// A container that ran this long starts over with the first backoff.
	healthyRun = 10 * time.Second
)

// container is one container of a pod. run owns it.
type container struct {
	pod  *pod
	spec *corev1.Container
	init bool

	mu     sync.Mutex
	status corev1.ContainerStatus // guarded by mu
	proc   *process.Process       // guarded by mu
}

func newContainer(p *pod, spec *corev1.Container, init bool) *container {
	return &container{pod: p, spec: spec, init: init, status: corev1.ContainerStatus{
		Name: spec.Name, Image: spec.Image, ImageID: "lab://" + spec.Image,
		State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ContainerCreating"}},
	}}
}

// set changes the status and has the pod's status written.
func (c *container) set(change func(*corev1.ContainerStatus)) {
	c.mu.Lock()
	change(&c.status)
	c.mu.Unlock()
	c.pod.report()
}

func (c *container) snapshot() corev1.ContainerStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	return *c.status.DeepCopy()
}

// run starts the container, and again as the restart policy says, until ctx ends
// or it is done. It returns the last exit code.
func (c *container) run(ctx context.Context) int {
	backoff := firstBackoff
	for {
		began := time.Now()
		code, err := c.once(ctx)
		if ctx.Err() != nil {
			return code
		}
		if time.Since(began) > healthyRun {
			backoff = firstBackoff
		}
		policy := c.pod.spec.Spec.RestartPolicy
		if err == nil && (policy == corev1.RestartPolicyNever || code == 0 && (c.init || policy == corev1.RestartPolicyOnFailure)) {
			return code
		}
		reason, message := "CrashLoopBackOff", fmt.Sprintf("back-off %s restarting failed container %s (exit code %d)", backoff, c.spec.Name, code)
		if unknown, ok := errors.AsType[*UnknownImageError](err); ok {
			reason, message = "ErrImagePull", unknown.Error()
		} else if err != nil {
			reason, message = "CreateContainerError", err.Error()
		}
		c.set(func(s *corev1.ContainerStatus) {
			if err == nil {
				s.LastTerminationState = s.State
				s.RestartCount++
			}
			s.State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}
		})
		if !wait(ctx, backoff) {
			return code
		}
		backoff = min(2*backoff, lastBackoff)
	}
}

// once runs the container from start to end.
func (c *container) once(ctx context.Context) (int, error) {
	argv, err := command(c.spec)
	if err != nil {
		return 0, err
	}
	log, err := os.OpenFile(c.pod.k.LogFile(c.pod.spec.Namespace, c.pod.spec.Name, c.spec.Name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	p, err := c.start(argv, nil, log, log)
	_ = log.Close() // the process has its own
	if err != nil {
		return 0, err
	}
	c.mu.Lock()
	c.proc = p
	c.mu.Unlock()
	started := c.spec.StartupProbe == nil
	c.set(func(s *corev1.ContainerStatus) {
		s.ContainerID = fmt.Sprintf("lab://%d", p.Pid())
		s.State = corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}}
		s.Started = &started
		s.Ready = started && c.spec.ReadinessProbe == nil
	})
	pctx, cancel := context.WithCancel(ctx)
	var probes sync.WaitGroup
	probes.Go(func() { c.probes(pctx, p) })
	select {
	case <-p.Done():
	case <-ctx.Done():
		p.Stop(c.grace())
	}
	cancel()
	probes.Wait()
	code, end := p.Exit()
	c.set(func(s *corev1.ContainerStatus) {
		reason := "Completed"
		if code != 0 {
			reason = "Error"
		}
		no := false
		s.Ready, s.Started = false, &no
		s.State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{
			ExitCode: int32(code), Reason: reason, FinishedAt: metav1.NewTime(end), ContainerID: s.ContainerID}}
	})
	return code, nil
}

func (c *container) grace() time.Duration {
	if g := c.pod.spec.Spec.TerminationGracePeriodSeconds; g != nil {
		return time.Duration(*g) * time.Second
	}
	return 30 * time.Second
}

// probes asks the container until ctx ends: startup first, then liveness and
// readiness beside each other.
func (c *container) probes(ctx context.Context, p *process.Process) {
	restart := func(kind string, why error) {
		c.pod.k.Log.Info("container restarted by probe", "pod", c.pod.key.String(), "container", c.spec.Name, "probe", kind, "err", why)
		go p.Stop(c.grace())
	}
	if c.spec.StartupProbe != nil {
		sctx, cancel := context.WithCancel(ctx)
		c.watch(sctx, c.spec.StartupProbe, func(ok bool, why error) {
			cancel()
			if !ok {
				restart("startup", why)
				return
			}
			c.set(func(s *corev1.ContainerStatus) {
				yes := true
				s.Started, s.Ready = &yes, c.spec.ReadinessProbe == nil
			})
		})
		cancel()
		if s := c.snapshot().Started; s == nil || !*s {
			return
		}
	}
	var both sync.WaitGroup
	defer both.Wait()
	if c.spec.LivenessProbe != nil {
		both.Go(func() {
			c.watch(ctx, c.spec.LivenessProbe, func(ok bool, why error) {
				if !ok {
					restart("liveness", why)
				}
			})
		})
	}
	if c.spec.ReadinessProbe != nil {
		both.Go(func() {
			c.watch(ctx, c.spec.ReadinessProbe, func(ok bool, why error) {
				if why != nil {
					c.pod.k.Log.Info("not ready", "pod", c.pod.key.String(), "container", c.spec.Name, "err", why)
				}
				c.set(func(s *corev1.ContainerStatus) { s.Ready = ok })
			})
		})
	}
}

// start starts a command in the container's surroundings.
func (c *container) start(argv []string, stdin, stdout, stderr *os.File) (*process.Process, error) {
	env, err := c.env()
	if err != nil {
		return nil, err
	}
	mounts, err := c.mounts()
	if err != nil {
		return nil, err
	}
	vars := map[string]string{}
	for _, kv := range env {
		k, v, _ := strings.Cut(kv, "=")
		vars[k] = v
	}
	full := make([]string, len(argv))
	for i, a := range argv {
		full[i] = expand(a, vars)
	}
	if full[0] == "ambit-sample" {
		full[0] = c.pod.k.Sample
	}
	host := c.pod.spec.Spec.Hostname
	if host == "" {
		host = c.pod.spec.Name
	}
	if len(host) > 63 {
		host = host[:63]
	}
	cgroup := ""
	if c.pod.cgroup != "" {
		cgroup = filepath.Join(c.pod.cgroup, c.spec.Name)
	}
	return process.Start(process.Spec{
		Cgroup: cgroup, Argv: full, Env: env, Dir: c.spec.WorkingDir, NetNS: c.pod.netns(), Private: true, Host: host, Mounts: mounts, Scratch: c.pod.dir,
	}, stdin, stdout, stderr)
}

// expand replaces $(NAME) as Kubernetes does in commands and arguments.
func expand(s string, vars map[string]string) string {
	var b strings.Builder
	for {
		i := strings.Index(s, "$(")
		if i < 0 {
			return b.String() + s
		}
		j := strings.IndexByte(s[i:], ')')
		if j < 0 {
			return b.String() + s
		}
		v, ok := vars[s[i+2:i+j]]
		if !ok {
			v = s[i : i+j+1]
		}
		b.WriteString(s[:i] + v)
		s = s[i+j+1:]
	}
}

// env is the container's environment.
func (c *container) env() ([]string, error) {
	vars := map[string]string{"PATH": c.pod.k.Path, "HOME": "/root", "TERM": "xterm", "HOSTNAME": c.pod.spec.Name}
	if len(c.spec.Ports) > 0 {
		vars["PORT"] = fmt.Sprint(c.spec.Ports[0].ContainerPort)
	}
	for _, f := range c.spec.EnvFrom {
		if f.ConfigMapRef != nil {
			cm, ok := cluster.Get[*corev1.ConfigMap](c.pod.k.Store, c.pod.spec.Namespace, f.ConfigMapRef.Name)
			if !ok && (f.ConfigMapRef.Optional == nil || !*f.ConfigMapRef.Optional) {
				return nil, fmt.Errorf("configmap %q not found", f.ConfigMapRef.Name)
			}
			if ok {
				for k, v := range cm.Data {
					vars[f.Prefix+k] = v
				}
			}
		}
	}
	for _, e := range c.spec.Env {
		v := expand(e.Value, vars)
		if e.ValueFrom != nil {
			var err error
			if v, err = c.valueFrom(e.ValueFrom); err != nil {
				return nil, fmt.Errorf("env %s: %w", e.Name, err)
			}
		}
		vars[e.Name] = v
	}
	var env []string
	for k, v := range vars {
		env = append(env, k+"="+v)
	}
	return env, nil
}

func (c *container) valueFrom(s *corev1.EnvVarSource) (string, error) {
	store, p := c.pod.k.Store, c.pod.spec
	switch {
	case s.FieldRef != nil:
		return c.field(s.FieldRef.FieldPath)
	case s.ConfigMapKeyRef != nil:
		cm, _ := cluster.Get[*corev1.ConfigMap](store, p.Namespace, s.ConfigMapKeyRef.Name)
		if cm != nil {
			if v, ok := cm.Data[s.ConfigMapKeyRef.Key]; ok {
				return v, nil
			}
		}
		if o := s.ConfigMapKeyRef.Optional; o != nil && *o {
			return "", nil
		}
		return "", fmt.Errorf("key %q of configmap %q not found", s.ConfigMapKeyRef.Key, s.ConfigMapKeyRef.Name)
	case s.SecretKeyRef != nil:
		sec, _ := cluster.Get[*corev1.Secret](store, p.Namespace, s.SecretKeyRef.Name)
		if sec != nil {
			if v, ok := sec.Data[s.SecretKeyRef.Key]; ok {
				return string(v), nil
			}
			if v, ok := sec.StringData[s.SecretKeyRef.Key]; ok {
				return v, nil
			}
		}
		if o := s.SecretKeyRef.Optional; o != nil && *o {
			return "", nil
		}
		return "", fmt.Errorf("key %q of secret %q not found", s.SecretKeyRef.Key, s.SecretKeyRef.Name)
	case s.ResourceFieldRef != nil:
		return "1", nil // the lab bounds no resources
	}
	return "", errors.New("unknown source")
}

func (c *container) field(path string) (string, error) {
	p := c.pod.spec
	if key, ok := strings.CutPrefix(path, "metadata.labels['"); ok {
		return p.Labels[strings.TrimSuffix(key, "']")], nil
	}
	if key, ok := strings.CutPrefix(path, "metadata.annotations['"); ok {
		return p.Annotations[strings.TrimSuffix(key, "']")], nil
	}
	var ips []string
	for _, a := range c.pod.addrs {
		ips = append(ips, a.String())
	}
	fields := map[string]string{
		"metadata.name": p.Name, "metadata.namespace": p.Namespace, "metadata.uid": string(p.UID),
		"spec.nodeName": p.Spec.NodeName, "spec.serviceAccountName": p.Spec.ServiceAccountName,
		"status.podIP": ips[0], "status.podIPs": strings.Join(ips, ","), "status.hostIP": c.pod.machine.Addrs[0].String(),
	}
	v, ok := fields[path]
	if !ok {
		return "", fmt.Errorf("fieldPath %q is not supported", path)
	}
	return v, nil
}

// mounts are the pod's own files and the container's volumes.
func (c *container) mounts() ([]process.Mount, error) {
	var out []process.Mount
	for _, f := range []string{"resolv.conf", "hosts", "hostname"} {
		target := "/etc/" + f
		if _, err := os.Stat(target); err != nil && f == "hostname" {
			continue // a machine without one needs none
		}
		out = append(out, process.Mount{Source: filepath.Join(c.pod.dir, f), Target: target})
	}
	for _, m := range c.spec.VolumeMounts {
		dir, err := c.pod.volume(m.Name)
		if err != nil {
			return nil, err
		}
		out = append(out, process.Mount{Source: filepath.Join(dir, m.SubPath), Target: m.MountPath, ReadOnly: m.ReadOnly})
	}
	return out, nil
}
