// Package kubelet runs the lab's pods: a network namespace each, their containers
// as processes with their own mounts and host name, probes, restarts, and the
// status that the rest of the cluster reads.
//
// One goroutine (Run) compares the store with the pods that run; each pod has a
// goroutine of its own, which owns it from its first address to its last process.
package kubelet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
	"github.com/ambit-mesh/ambit/test/lab/fabric"
	"github.com/ambit-mesh/ambit/test/lab/process"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// Managed is the annotation of pods whose process someone else runs: the mesh's
// own components.
const Managed = "lab.ambit.dev/component"

// NetNSAnnotation tells the node agent where a pod's network namespace is.
const NetNSAnnotation = "ambit.dev/netns"

// Config is what a Kubelet needs. One serves all nodes.
type Config struct {
	Store  *cluster.Store
	Net    *fabric.Network
	Dir    string // pods' files
	LogDir string
	Sample string // path of ambit-sample
	Path   string // PATH of containers
	// Cgroup is the directory above the cgroups of a node's pods; nil: pods have none.
	Cgroup func(node string) string
	// CNI calls the mesh's plugin with ADD, before anybody knows the pod's addresses,
	// and with DEL when the pod has ended. Nil: there is none.
	CNI func(ctx context.Context, command string, s Sandbox) error
	// Admit waits until a pod with addresses may start its containers, as a CNI
	// plugin does. It returns an error when ctx ends. Nil admits at once.
	Admit func(ctx context.Context, namespace, name string) error
	Log   *slog.Logger
}

// Sandbox is a pod's place in the network, as the CNI plugin hears of it.
type Sandbox struct {
	Node, Namespace, Name, UID string
	NetNS                      string
	Addrs                      []netip.Addr
}

// Kubelet runs pods.
type Kubelet struct {
	Config

	mu   sync.Mutex
	pods map[types.UID]*pod // guarded by mu
}

// New returns a Kubelet.
func New(cfg Config) *Kubelet { return &Kubelet{Config: cfg, pods: map[types.UID]*pod{}} }

// Run runs what the store says until ctx ends; then all pods are stopped.
func (k *Kubelet) Run(ctx context.Context) error {
	if err := errors.Join(os.MkdirAll(k.Dir, 0o755), os.MkdirAll(k.LogDir, 0o755)); err != nil {
		return err
	}
	var pods sync.WaitGroup
	defer pods.Wait()
	wakec, stop := k.Store.Watch()
	defer stop()
	for {
		select {
		case <-wakec:
		case <-ctx.Done():
			return nil
		}
		wanted := map[types.UID]bool{}
		for _, p := range cluster.List[*corev1.Pod](k.Store, "") {
			wanted[p.UID] = true
			k.look(ctx, p, &pods)
		}
		k.mu.Lock()
		for uid, p := range k.pods {
			if !wanted[uid] {
				p.cancel() // forgotten without notice: its processes still have to end
			}
		}
		k.mu.Unlock()
	}
}

// look starts a pod that is new and stops one that is marked for deletion.
func (k *Kubelet) look(ctx context.Context, spec *corev1.Pod, running *sync.WaitGroup) {
	if spec.Annotations[Managed] != "" {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	p := k.pods[spec.UID]
	switch {
	case p != nil && spec.DeletionTimestamp != nil:
		p.cancel()
	case p != nil:
	case spec.DeletionTimestamp != nil:
		_ = k.Store.Forget(cluster.KeyOf(spec)) // it never ran; a file that stays is shown by the next write
	case spec.Spec.NodeName != "":
		m, ok := k.Net.Node(spec.Spec.NodeName)
		if !ok {
			k.Log.Warn("pod names a node that does not exist", "pod", cluster.KeyOf(spec).String(), "node", spec.Spec.NodeName)
			return
		}
		pctx, cancel := context.WithCancel(ctx)
		p := &pod{k: k, key: cluster.KeyOf(spec), spec: spec, machine: m, dir: filepath.Join(k.Dir, string(spec.UID)), cancel: cancel}
		if k.Cgroup != nil {
			p.cgroup = filepath.Join(k.Cgroup(m.Name), spec.Namespace+"_"+spec.Name)
		}
		k.pods[spec.UID] = p
		running.Go(func() {
			p.run(pctx)
			cancel()
			k.mu.Lock()
			delete(k.pods, spec.UID)
			k.mu.Unlock()
			if ctx.Err() == nil {
				if err := k.Store.Forget(p.key); err != nil {
					k.Log.Warn("forget pod", "err", err)
				}
			}
		})
	}
}

// Hosts are the network namespaces of the pods that have one, by the pods' UIDs.
func (k *Kubelet) Hosts() map[types.UID]*netlab.Host {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := map[types.UID]*netlab.Host{}
	for uid, p := range k.pods {
		p.mu.Lock()
		if p.placed && p.net != nil {
			out[uid] = p.net.Host
		}
		p.mu.Unlock()
	}
	return out
}

// LogFile is where a container's output goes.
func (k *Kubelet) LogFile(namespace, pod, container string) string {
	return filepath.Join(k.LogDir, namespace+"."+pod+"."+container+".log")
}

// ErrNotRunning is returned by Exec for a pod that has no place yet.
var ErrNotRunning = errors.New("pod is not running")

// Exec starts a command in a pod's surroundings, in the named container or the
// first.
func (k *Kubelet) Exec(namespace, name, containerName string, argv []string, stdin, stdout, stderr *os.File) (*process.Process, error) {
	k.mu.Lock()
	var found *pod
	for _, p := range k.pods {
		if p.key.Namespace == namespace && p.key.Name == name {
			found = p
		}
	}
	k.mu.Unlock()
	if found == nil {
		return nil, fmt.Errorf("pod %s/%s: %w", namespace, name, ErrNotRunning)
	}
	found.mu.Lock()
	containers := found.containers
	placed := found.placed
	found.mu.Unlock()
	if !placed {
		return nil, fmt.Errorf("pod %s/%s: %w", namespace, name, ErrNotRunning)
	}
	for _, c := range containers {
		if containerName == "" && !c.init || c.spec.Name == containerName {
			return c.start(argv, stdin, stdout, stderr)
		}
	}
	return nil, fmt.Errorf("pod %s/%s has no container %q", namespace, name, containerName)
}

// Signal sends a signal to the containers of a pod.
func (k *Kubelet) Signal(namespace, name string, sig syscall.Signal) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, p := range k.pods {
		if p.key.Namespace != namespace || p.key.Name != name {
			continue
		}
		var errs []error
		for _, c := range p.all() {
			c.mu.Lock()
			if c.proc != nil && !c.init {
				errs = append(errs, c.proc.Signal(sig))
			}
			c.mu.Unlock()
		}
		return errors.Join(errs...)
	}
	return fmt.Errorf("pod %s/%s: %w", namespace, name, ErrNotRunning)
}
