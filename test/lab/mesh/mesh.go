// Package mesh runs the mesh's own programs in the lab: ambitd on the control
// machine and, on each node, ambit-node and ztunnel, with the files, tokens and
// environment they have in Kubernetes.
//
//	cluster/ ──▶ ambitd :15012 ──▶ ztunnel ◀── ambit-node ◀── cluster/
//	                                              └─▶ status/ ──▶ annotations
//
// Run owns every process; one goroutine per component starts it again when it
// ends. Other methods may be called from any goroutine.
package mesh

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
	"github.com/ambit-mesh/ambit/test/lab/controller"
	"github.com/ambit-mesh/ambit/test/lab/dns"
	"github.com/ambit-mesh/ambit/test/lab/fabric"
	"github.com/ambit-mesh/ambit/test/lab/kubelet"
	"github.com/ambit-mesh/ambit/test/lab/process"
)

// Namespace is the mesh's own.
const Namespace = "ambit-system"

// Redirection is the annotation that says whether a pod is in the mesh.
const Redirection = "ambient.istio.io/redirection"

// ModeLabel enrols a namespace or a pod.
const ModeLabel = "istio.io/dataplane-mode"

// Programs are those a lab with a mesh needs beside its own.
var Programs = []string{"ambitd", "ambit-node", "ambit-cni", "ztunnel"}

// Config is what a Mesh needs.
type Config struct {
	Store     *cluster.Store
	Net       *fabric.Network
	Bin       string // directory of the programs
	Dir       string // state of the programs
	Source    string // the published objects
	LogDir    string
	SecretTTL time.Duration     // lifetime of workload certificates; 0 leaves the default
	Env       []string          // further variables for ztunnel
	ZTunnel   map[string]string // by node: another program that takes ztunnel's place there
	Redirect  Redirect
	Log       *slog.Logger
}

// Redirect is how connections get to the proxies.
type Redirect struct {
	Flag string // ambit-node's --redirect
	// Cgroups of a node's pods and of one node process or pod; nil: processes have none.
	Pods func(node string) string
	Root string // cgroup directory above all of the lab's processes; "": there are no cgroups
	BPF  string // directory above each node's BPF file system, where there are any
}

// Mesh is the running programs.
type Mesh struct {
	Config
	ambitd     *Component
	components []*Component // ambitd first; immutable after New

	readyc chan struct{} // closed when all were ready once
}

// New prepares a mesh.
func New(cfg Config) (*Mesh, error) {
	m := &Mesh{Config: cfg, readyc: make(chan struct{})}
	for _, dir := range []string{m.ambitdDir(), m.tokenDir(), m.LogDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	for _, p := range Programs {
		if _, err := os.Stat(filepath.Join(cfg.Bin, p)); err != nil {
			return nil, fmt.Errorf("find the program %s: %w (make build makes it; --no-mesh does without)", p, err)
		}
	}
	var ips []string
	for _, a := range cfg.Net.Control.Addrs {
		ips = append(ips, a.String())
	}
	m.ambitd = m.component("ambitd", cfg.Net.Control, []string{
		"serve", "--source", "dir:" + cfg.Source, "--state-dir", m.ambitdDir(), "--advertise-ip", strings.Join(ips, ","),
		"--listen", ":15012", "--monitoring", ":15014",
	}, nil, cfg.Net.Control.Addrs[0], 15014, "/ready")
	for _, n := range cfg.Net.Nodes {
		m.node(n)
	}
	return m, nil
}

func (m *Mesh) ambitdDir() string { return filepath.Join(m.Dir, "ambitd") }
func (m *Mesh) tokenDir() string  { return filepath.Join(m.Dir, "tokens") }

func (m *Mesh) component(name string, at *fabric.Machine, args, env []string, addr netip.Addr, port uint16, path string) *Component {
	program, _, _ := strings.Cut(name, "@")
	c := &Component{
		Name: name, Machine: at, LogFile: filepath.Join(m.LogDir, name+".log"), log: m.Log,
		argv: append([]string{filepath.Join(m.Bin, program)}, args...), env: append(os.Environ(), env...),
		ready: netip.AddrPortFrom(addr, port), path: path, wakec: make(chan syscall.Signal, 1), rollc: make(chan rollout),
	}
	if m.Redirect.Pods != nil {
		c.cgroup = filepath.Join(m.Redirect.Pods(at.Name), Namespace+"_"+podName(program, at.Name))
	}
	m.components = append(m.components, c)
	return c
}

// node adds a node's two programs and the pods that stand for them.
func (m *Mesh) node(n *fabric.Machine) {
	dir := filepath.Join(m.Dir, n.Name)
	zds, status := filepath.Join(dir, "ztunnel.sock"), filepath.Join(dir, "status")
	local := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	agent := []string{"--source", "dir:" + m.Source, "--node", n.Name, "--zds-path", zds, "--status-dir", status,
		"--cni-socket", m.cniSocket(n.Name), "--state-dir", m.stateDir(n.Name)}
	m.component("ambit-node@"+n.Name, n, append(agent, m.Redirect.flags(n.Name)...), nil, local, 15022, "/healthz/ready")
	at := "https://" + net.JoinHostPort(m.Net.Control.Addrs[0].String(), "15012")
	root := filepath.Join(m.ambitdDir(), "root-cert.pem")
	env := []string{
		"XDS_ADDRESS=" + at, "CA_ADDRESS=" + at, "XDS_ROOT_CA=" + root, "CA_ROOT_CA=" + root,
		"AUTH_TOKEN=" + filepath.Join(m.tokenDir(), n.Name), "NODE_NAME=" + n.Name, "POD_NAME=" + podName("ztunnel", n.Name),
		"POD_NAMESPACE=" + Namespace, "SERVICE_ACCOUNT=ztunnel", "INSTANCE_IP=" + n.Addrs[0].String(), "INPOD_UDS=" + zds,
		"CLUSTER_ID=Kubernetes", "TRUST_DOMAIN=cluster.local",
	}
	if m.SecretTTL > 0 {
		env = append(env, "SECRET_TTL="+m.SecretTTL.String())
	}
	if !m.Net.IPv6 {
		env = append(env, "IPV6_ENABLED=false")
	}
	c := m.component("ztunnel@"+n.Name, n, nil, append(env, m.Env...), local, 15021, "/healthz/ready")
	if program := m.ZTunnel[n.Name]; program != "" {
		c.argv[0] = program
	}
	// As a pod it asks the cluster DNS for the host names of endpoints.
	c.mounts = []process.Mount{{Source: m.resolvConf(n), Target: "/etc/resolv.conf"}}
	// In Kubernetes each proxy has a network namespace of its own.
	c.next = []string{fmt.Sprintf("ADMIN_ADDR=localhost:%d", adminPort+sideStep), fmt.Sprintf("STATS_ADDR=:%d", 15020+sideStep),
		fmt.Sprintf("READINESS_ADDR=:%d", 15021+sideStep)}
}

// flags are an agent's.
func (r Redirect) flags(node string) []string {
	out := []string{"--redirect", r.Flag, "--bpffs-dir", filepath.Join(r.BPF, node)}
	if r.Pods != nil {
		out = append(out, "--cgroup-root", r.Pods(node))
	}
	return out
}

// AgentCommand is a command of the node's agent, which on a machine of its own would
// find the agent's directories where they are by default.
func (m *Mesh) AgentCommand(node string, args []string) []string {
	out := append([]string{filepath.Join(m.Bin, "ambit-node")}, args...)
	if len(args) > 0 && args[0] != "version" && args[0] != "help" {
		out = slices.Insert(out, 2, "--status-dir", filepath.Join(m.Dir, node, "status"), "--bpffs-dir", filepath.Join(m.Redirect.BPF, node))
	}
	return out
}

// NodeRedirect is how a node's agent captures pods, and why.
type NodeRedirect struct {
	Node       string `json:"node"`
	Redirector string `json:"redirector"` // ebpf, nftables; "" before the agent has chosen
	Reason     string `json:"reason"`
}

// Redirections asks the agents' status.
func (m *Mesh) Redirections() (all []NodeRedirect) {
	for _, n := range m.Net.Nodes {
		var r NodeRedirect
		if b, err := os.ReadFile(filepath.Join(m.Dir, n.Name, "status", "node", "status.json")); err == nil {
			_ = json.Unmarshal(b, &r) // a file half of which is there says nothing
		}
		r.Node = n.Name
		all = append(all, r)
	}
	return all
}

func (m *Mesh) resolvConf(n *fabric.Machine) string {
	return filepath.Join(m.Dir, n.Name, "resolv.conf")
}

func podName(program, node string) string { return program + "-" + node }

// Run starts the mesh and keeps it up until ctx ends.
func (m *Mesh) Run(ctx context.Context) error {
	for _, n := range m.Net.Nodes {
		if err := os.MkdirAll(filepath.Join(m.Dir, n.Name, "status"), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(m.resolvConf(n), []byte(dns.Conf(controller.DNSAddr, Namespace)), 0o644); err != nil {
			return err
		}
	}
	for _, c := range m.components {
		if err := m.pod(c); err != nil {
			return err
		}
	}
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	running.Go(func() { m.ambitd.run(ctx) })
	if err := m.Await(ctx, m.ambitd); err != nil {
		return ignoreEnd(ctx, err)
	}
	if err := m.tokens(ctx); err != nil {
		return ignoreEnd(ctx, err)
	}
	for _, c := range m.components[1:] {
		running.Go(func() { c.run(ctx) })
	}
	running.Go(func() { m.annotate(ctx) })
	for _, c := range m.components[1:] {
		if err := m.Await(ctx, c); err != nil {
			return ignoreEnd(ctx, err)
		}
	}
	close(m.readyc)
	return m.refresh(ctx)
}

// ignoreEnd drops errors that only say that ctx ended.
func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// Ready is closed when everything was ready once.
func (m *Mesh) Ready() <-chan struct{} { return m.readyc }

// readyTimeout is long: the first start reads programs from a cold disk, and a test
// shares the machine with others.
const readyTimeout = 100 * time.Second

// hopeless is how often a program may end before it was ready for the first time,
// until it is taken to be one that cannot run here.
const hopeless = 7

// Await waits until a component is ready.
func (m *Mesh) Await(ctx context.Context, c *Component) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	var last error
	for {
		if last = c.Check(ctx); last == nil {
			m.Log.Info("ready", "component", c.Name)
			return m.pod(c)
		}
		if n := c.Restarts(); n >= hopeless && !c.wasReady.Load() {
			return fmt.Errorf("%s cannot run here: it ended %d times before it was ready: %w; its last log lines:\n%s", c.Name, n, last, c.Tail(15))
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready after %s: %w; its last log lines:\n%s", c.Name, readyTimeout, last, c.Tail(15))
		}
	}
}

// pod publishes the Pod that stands for a component: the CA accepts a token only
// for a pod that exists, on its node.
func (m *Mesh) pod(c *Component) error {
	program, node, _ := strings.Cut(c.Name, "@")
	node = cmp.Or(node, fabric.ControlName)
	old, _ := cluster.Get[*corev1.Pod](m.Store, Namespace, podName(program, node))
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: Namespace, Name: podName(program, node), Labels: map[string]string{"app": program},
			Annotations: map[string]string{kubelet.Managed: c.Name},
		},
		Spec: corev1.PodSpec{NodeName: node, HostNetwork: true, ServiceAccountName: program,
			Containers: []corev1.Container{{Name: program, Image: program}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, HostIP: c.Machine.Addrs[0].String(), PodIP: c.Machine.Addrs[0].String()},
	}
	for _, a := range c.Machine.Addrs {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	if old != nil {
		p.Status.StartTime = old.Status.StartTime
	} else {
		now := metav1.NewTime(time.Now().UTC().Truncate(time.Second))
		p.Status.StartTime = &now
	}
	ready := corev1.ConditionFalse
	if c.Pid() != 0 && c.wasReady.Load() {
		ready = corev1.ConditionTrue
	}
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: ready}}
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: program, Image: program, Ready: ready == corev1.ConditionTrue, RestartCount: int32(c.Restarts())}}
	sa := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: Namespace, Name: program}}
	return errors.Join(m.Store.Put(sa), m.Store.Put(p))
}

// tokens mints each node's token, as a projected volume would hold it.
func (m *Mesh) tokens(ctx context.Context) error {
	for _, n := range m.Net.Nodes {
		name := podName("ztunnel", n.Name)
		p, ok := cluster.Get[*corev1.Pod](m.Store, Namespace, name)
		if !ok {
			return fmt.Errorf("mint token: pod %s not found", name)
		}
		out, err := m.output(ctx, "token", "--state-dir", m.ambitdDir(), "--node", n.Name, "--namespace", Namespace,
			"--service-account", "ztunnel", "--pod", name, "--uid", string(p.UID), "--ttl", "24h")
		if err != nil {
			return fmt.Errorf("mint token for %s: %w", n.Name, err)
		}
		temp := filepath.Join(m.tokenDir(), "."+n.Name)
		if err := os.WriteFile(temp, []byte(strings.TrimSpace(out)), 0o600); err != nil {
			return err
		}
		if err := os.Rename(temp, filepath.Join(m.tokenDir(), n.Name)); err != nil {
			return err
		}
	}
	return nil
}

// refresh mints tokens again long before they expire.
func (m *Mesh) refresh(ctx context.Context) error {
	t := time.NewTicker(12 * time.Hour)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if err := m.tokens(ctx); err != nil {
				m.Log.Warn("refresh tokens", "err", err)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// nodeStatus is the file that ambit-node writes per pod.
type nodeStatus struct {
	UID         string `json:"uid"`
	Redirection string `json:"redirection"`
	Reason      string `json:"reason"`
}

// annotate copies the agents' answers into pods, as their patches of pods/status
// do in Kubernetes. Ten looks per second at a few small files cost nothing.
func (m *Mesh) annotate(ctx context.Context) {
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		found := map[string]string{}
		for _, n := range m.Net.Nodes {
			files, _ := filepath.Glob(filepath.Join(m.Dir, n.Name, "status", "*.json")) // the pattern is valid
			for _, f := range files {
				var s nodeStatus
				if b, err := os.ReadFile(f); err == nil && json.Unmarshal(b, &s) == nil {
					found[s.UID] = s.Redirection
				}
			}
		}
		for _, p := range cluster.List[*corev1.Pod](m.Store, "") {
			if p.Annotations[Redirection] == found[string(p.UID)] {
				continue
			}
			var value *string
			if v := found[string(p.UID)]; v != "" {
				value = &v
			}
			_ = m.Store.Mark(cluster.KeyOf(p), true, map[string]*string{Redirection: value}) // a pod that is gone needs none
		}
	}
}

// Enrolled reports whether a pod is meant to be in the mesh: its own label beats
// its namespace's.
func Enrolled(store *cluster.Store, p *corev1.Pod) bool {
	if p.Spec.HostNetwork {
		return false
	}
	if v, ok := p.Labels[ModeLabel]; ok {
		return v == "ambient"
	}
	ns, ok := cluster.Get[*corev1.Namespace](store, "", p.Namespace)
	return ok && ns.Labels[ModeLabel] == "ambient"
}

// Admit holds a pod's containers back until the control plane knows that the pod is
// in the mesh. The CNI plugin has seen to its capture by then; without this, peers
// that hear of the pod before its redirection would try it in clear text first.
func (m *Mesh) Admit(ctx context.Context, namespace, name string) error {
	wakec, stop := m.Store.Watch()
	defer stop()
	for {
		p, ok := cluster.Get[*corev1.Pod](m.Store, namespace, name)
		if ok && (!Enrolled(m.Store, p) || p.Annotations[Redirection] == "enabled") {
			return nil
		}
		select {
		case <-wakec:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Components lists the programs, ambitd first.
func (m *Mesh) Components() []*Component { return m.components }

// Component finds one by name.
func (m *Mesh) Component(name string) (*Component, bool) {
	for _, c := range m.components {
		if c.Name == name {
			return c, true
		}
	}
	return nil, false
}

// Problems asks ambitd what it could not use. A missing answer is an error.
func (m *Mesh) Problems(ctx context.Context) ([]Problem, error) {
	body, err := m.ambitd.get(ctx, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), m.ambitd.ready.Port()), "/status") // answers its own host
	if err != nil {
		return nil, err
	}
	var s struct{ Problems []Problem }
	if err := json.Unmarshal(body, &s); err != nil {
		return nil, fmt.Errorf("read ambitd's status: %w", err)
	}
	return s.Problems, nil
}

// Problem is one object that ambitd does not enforce as written.
type Problem struct {
	File, Kind, Namespace, Name, Path, Message, Hint string
	Line                                             int
}

func (p Problem) String() string {
	s := fmt.Sprintf("%s %s/%s %s: %s", p.Kind, p.Namespace, p.Name, p.Path, p.Message)
	if p.Hint != "" {
		s += " (" + p.Hint + ")"
	}
	return s
}

// client talks to a component in its own network.
func (c *Component) client() *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return c.Machine.NS.Dial(ctx, &net.Dialer{}, network, addr)
		}}}
}

func (c *Component) get(ctx context.Context, at netip.AddrPort, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at.String()+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.client().Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d: %s", resp.StatusCode, strings.TrimSpace(string(body)))
	}
	return body, nil
}
