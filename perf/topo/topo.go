// Package topo puts the things that are compared into one network: nodes and pods
// of a lab (test/lab), and per mode whatever stands between a client and a server.
//
//	              node-1                        node-2              node-3 and on, per peer
//	none          client ─────────────────────▶ server
//	relay, tls    client ─▶ hop ──────────────▶ hop ─▶ server
//	ambit         client ─▶ ztunnel ══════════▶ ztunnel ─▶ server
//	peer          as ambit, with its program in ztunnel's place      client, server
//
//	one HTTP hop  client ─────────────────────▶ hop ─▶ server
//
// The HTTP hop is a proxy at the server's node, as a waypoint is: ours of net/http,
// or a program of others that is configured alike.
//
// Everything runs at the same time in the same lab, so that modes can be measured
// in turn; what is not being measured is idle. Peers are configured by the same
// control plane and certificate authority as our own proxy. The lab is driven by
// its command line, as its users do. A Lab's methods are for one goroutine.
package topo

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/perf/inspect"
	"github.com/ambit-mesh/ambit/perf/load"
	"github.com/ambit-mesh/ambit/perf/peer"
)

// Placement says where client and server are.
type Placement string

// Placements.
const (
	Cross Placement = "cross-node"
	Same  Placement = "same-node"
	Hop1  Placement = "http-hop"
)

// Placements are all of them, in the order of reports.
var Placements = []Placement{Cross, Same, Hop1}

// Built-in modes. Peers have the names that users give them.
const (
	None        = "none"
	Relay       = "relay"
	TLS         = "tls"
	Ambit       = "ambit"
	Accelerated = "ambit-accelerated"
	NetHTTP     = "net-http"
)

// BuiltIn are the modes that need no other program, in the order of reports.
var BuiltIn = []string{None, Relay, TLS, Ambit, Accelerated, NetHTTP}

// Peer is a program of others.
type Peer struct {
	Kind    peer.Kind
	Program string
}

// Config is what a Lab is made of.
type Config struct {
	Bin   string // directory of the mesh's and the lab's programs
	Self  string // the program with the verbs Client, Serve, Hop and Hellos
	Modes []string
	Peers map[string]Peer // by mode
	Env   []string        // further settings of all node proxies
	// Placements are those that are needed; nil: all.
	Placements []Placement

	// Neighbours makes two more pods per namespace, on either node, and one
	// outside the mesh, which are what a pod shares proxies with.
	Neighbours bool

	// ProfileDir takes profiles of our processes in every run; "": none.
	ProfileDir string

	Out io.Writer // what the lab says while it starts
}

// Verbs of the program's runs inside the lab.
const (
	Client = "in-pod-client"
	Serve  = "in-pod-server"
	Hop    = "in-node-hop"
	Proxy  = "in-node-proxy"
	Asker  = "in-node-asker"
	Churn  = "in-node-churn"
	Member = "in-node-member"
	Hellos = "in-node-hellos"
)

// Lab is a running one.
type Lab struct {
	Config
	name   string
	meshed bool

	ends  map[string]end  // mode → its pods
	paths map[string]Path // mode and placement

	members map[string]member // by mode: who makes handshakes
	crowd   Crowd
	control int            // process of the control plane; 0: there is none
	agents  map[string]int // processes of nodes' agents

	mu     sync.Mutex
	agreed []load.Agreed // guarded by mu
	hops   int           // HTTP hops
	asks   *inspect.Client
	asking io.Closer // what ends the asker
	keeper *keeper
	behind []*exec.Cmd // hops and watchers, in the order of their start
}

// end is where a mode's pods are.
type end struct {
	namespace   string
	near, far   string // nodes
	nearIP      string // of the server beside the client
	farIP       string // of the other one
	otherIP     string // of the neighbours' server, on the far node
	clientIP    string
	serverPID   map[Placement]int // in the lab's process namespace
	accelerated bool
}

// Path is one mode between one pair of pods.
type Path struct {
	Mode      string
	Placement Placement
	Namespace string // of the client
	Server    string // what the client dials
	Watch     []load.Process
	TLSServer string // address whose handshakes are this path's; "" when it has none
	TLSClient string // and the address that makes them; "": whoever does
	About     string
	Commands  []string // of the proxies
	Version   string
	Targets   []inspect.Target // Go programs that have an admin port
	Settings  string           // the file, or the variables, a peer was configured with; "" when it had none
	Logs      string           // what it writes and serves meanwhile
	Records   string           // who protects its TLS records

	Near, Far string // nodes
	Meshed    bool   // the proxies are told what to do by the control plane
	Rolls     bool   // a next process may be started beside the one that runs
}

// Supports reports whether a mode exists for a placement. Modes that are not built
// in are peers, and mean a node proxy where they are not known.
func (c Config) Supports(mode string, p Placement) bool {
	http := mode == NetHTTP || slices.Contains(peer.HTTP, c.Peers[mode].Kind)
	if c.Placements != nil && !slices.Contains(c.Placements, p) {
		return false
	}
	switch p {
	case Hop1:
		return http || mode == None
	case Same:
		return !http
	}
	return !http && mode != Accelerated
}

// Planned is what a path will be, before there is one.
func (c Config) Planned(mode string, to Placement) (Path, bool) {
	p := Path{Mode: mode, Placement: to}
	p.Rolls = mode == Ambit || mode == Accelerated
	p.Meshed = p.Rolls || c.Peers[mode].Kind == peer.Ztunnel
	if p.Meshed || mode == TLS {
		p.TLSServer = "to be"
	}
	if mode != None {
		p.Watch = []load.Process{{Name: mode, Proxy: true}}
	}
	return p, c.Supports(mode, to)
}

// Start brings everything up. The caller must call Close.
func Start(ctx context.Context, cfg Config) (*Lab, error) {
	l := &Lab{Config: cfg, name: fmt.Sprintf("perf-%d", os.Getpid()), ends: map[string]end{}, paths: map[string]Path{}, members: map[string]member{}}
	args := []string{"up"}
	nodes := 2
	for _, m := range cfg.Modes {
		p, known := cfg.Peers[m]
		proxy := known && p.Kind == peer.Ztunnel
		if proxy {
			for range 2 {
				nodes++
				args = append(args, "--ztunnel", fmt.Sprintf("node-%d=%s", nodes, p.Program))
			}
		} else if known && slices.Contains(peer.HTTP, p.Kind) {
			// It is started on a node when the lab is there.
		} else if known {
			return nil, fmt.Errorf("peer %s: kind %q: want %s, or an HTTP proxy's: %s", m, p.Kind, peer.Ztunnel, peer.HTTP)
		} else if !slices.Contains(BuiltIn, m) {
			return nil, fmt.Errorf("mode %q is neither built in (%s) nor a --peer", m, strings.Join(BuiltIn, ", "))
		}
		l.meshed = l.meshed || proxy || m == Ambit || m == Accelerated
	}
	args = append(args, "--nodes", fmt.Sprint(nodes))
	if !l.meshed {
		args = append(args, "--no-mesh")
	}
	for _, e := range cfg.Env {
		args = append(args, "--env", e)
	}
	roomForConnections()
	var err error
	if l.keeper, err = keep(cfg.Bin, l.name); err != nil {
		return nil, err
	}
	if _, err := l.do(ctx, "", args...); err != nil {
		l.Close() // who was stopped in the middle may have left it
		return nil, fmt.Errorf("start the lab: %w", err)
	}
	if err := l.fill(ctx); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// enoughFiles is for a proxy of one node with both sides of 10000 connections.
const enoughFiles = 1 << 17

// roomForConnections raises the limit of open files that everything in the lab has
// from this process. Who may not raise it has what there is: runs say what fails.
func roomForConnections() {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil || limit.Cur >= enoughFiles {
		return
	}
	for _, most := range []uint64{max(limit.Max, enoughFiles), limit.Max} {
		if unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: min(most, max(limit.Cur, enoughFiles)), Max: most}) == nil {
			return
		}
	}
}

// roomForPorts lets a namespace's clients make as many connections as they can: with
// what Linux has by default 28000 to one server are the most in a minute, which is how
// long a port is kept after its connection (TIME_WAIT), and what comes later fails.
func (l *Lab) roomForPorts(ctx context.Context, ns string) error {
	const settings = "cd /proc/sys/net/ipv4 && echo 1024 65535 >ip_local_port_range && echo 1 >tcp_tw_reuse"
	for _, pod := range []string{"client", "neighbour", "stranger"} {
		if pod != "client" && !l.Neighbours {
			continue
		}
		if _, err := l.do(ctx, "", "exec", pod, "-n", ns, "--", "sh", "-c", settings); err != nil {
			return fmt.Errorf("let pod %s/%s have more ports: %w", ns, pod, err)
		}
	}
	return nil
}

// Close ends the lab and everything in it.
func (l *Lab) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if l.asking != nil {
		_ = l.asking.Close()
	}
	_, _ = l.do(ctx, "", "down") // with it ends what was started in it
	l.keeper.release()
	for _, c := range l.behind {
		_ = c.Wait() // killed, by then
	}
}

// command is one of the lab's.
func (l *Lab) command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, filepath.Join(l.Bin, "ambit-lab"), append([]string{"--name", l.name}, args...)...)
}

func (l *Lab) do(ctx context.Context, stdin string, args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd := l.command(ctx, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("ambit-lab %s: %w: %s", args[0], cmp.Or(context.Cause(ctx), err), strings.TrimSpace(errs.String()))
	}
	if l.Out != nil && errs.Len() > 0 && args[0] != "exec" {
		_, _ = l.Out.Write(errs.Bytes()) // as any program that prints
	}
	return out.String(), nil
}

// fill makes the pods and, per mode, what stands between them.
func (l *Lab) fill(ctx context.Context) error {
	node := 2
	plain := end{namespace: "plain", near: "node-1", far: "node-2"}
	for _, m := range l.Modes {
		switch {
		case l.Peers[m].Kind == peer.Ztunnel:
			l.ends[m] = end{namespace: m, near: fmt.Sprintf("node-%d", node+1), far: fmt.Sprintf("node-%d", node+2)}
			node += 2
		case m == Ambit:
			l.ends[m] = end{namespace: "ambit", near: "node-1", far: "node-2"}
		case m == Accelerated:
			l.ends[m] = end{namespace: "accelerated", near: "node-1", far: "node-2", accelerated: true}
		default:
			l.ends[m] = plain
		}
	}
	manifests := map[string]string{}
	for _, e := range l.ends {
		manifests[e.namespace] = e.manifest(l.Self, l.Neighbours)
	}
	for _, ns := range slices.Sorted(maps.Keys(manifests)) {
		if _, err := l.do(ctx, manifests[ns], "apply", "-f", "-"); err != nil {
			return err
		}
	}
	for _, ns := range slices.Sorted(maps.Keys(manifests)) {
		if _, err := l.do(ctx, "", "wait", "-n", ns, "--timeout", "60s"); err != nil {
			return err
		}
	}
	for _, ns := range slices.Sorted(maps.Keys(manifests)) {
		if err := l.roomForPorts(ctx, ns); err != nil {
			return err
		}
	}
	if err := l.watchHandshakes(ctx); err != nil {
		return err
	}
	if l.meshed {
		if err := l.startAsker(ctx); err != nil {
			return err
		}
	}
	for _, m := range l.Modes {
		e, err := l.locate(ctx, l.ends[m])
		if err != nil {
			return err
		}
		l.ends[m] = e
		for _, p := range Placements {
			if !l.Supports(m, p) {
				continue
			}
			path, err := l.lay(ctx, m, e, p)
			if err != nil {
				return fmt.Errorf("prepare %s, %s: %w", m, p, err)
			}
			l.paths[m+string(p)] = path
		}
	}
	for _, m := range l.Modes {
		for _, p := range Placements {
			if path, ok := l.paths[m+string(p)]; ok {
				if err := l.prove(ctx, path); err != nil {
					return fmt.Errorf("prove %s, %s: %w", m, p, err)
				}
			}
		}
	}
	return nil
}

// manifest is a mode's namespace: a client, a server beside it, a server away.
func (e end) manifest(self string, neighbours bool) string {
	labels, notes := "", ""
	if e.namespace != "plain" {
		labels = `, labels: {istio.io/dataplane-mode: ambient}`
	}
	if e.accelerated {
		notes = `, annotations: {ambit.dev/accelerate: "true"}`
	}
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Namespace\nmetadata: {name: %s%s%s}\n", e.namespace, labels, notes)
	pods := []struct{ name, node, command, notes string }{
		{"client", e.near, `ambit-sample, pause`, ""}, {"near", e.near, fmt.Sprintf("%q, %s", self, Serve), ""}, {"far", e.far, fmt.Sprintf("%q, %s", self, Serve), ""},
	}
	if neighbours {
		pods = append(pods, []struct{ name, node, command, notes string }{
			{"neighbour", e.near, `ambit-sample, pause`, ""}, {"other", e.far, `ambit-sample, echo`, ""},
			{"stranger", e.near, `ambit-sample, pause`, `, labels: {istio.io/dataplane-mode: none}`},
		}...)
	}
	for _, pod := range pods {
		fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: %s%s}\nspec:\n  nodeName: %s\n  terminationGracePeriodSeconds: 1\n  containers:\n"+
			"  - {name: c, image: ambit-sample, command: [%s]}\n", pod.name, e.namespace, pod.notes, pod.node, pod.command)
	}
	return b.String()
}

// locate asks for addresses and processes.
func (l *Lab) locate(ctx context.Context, e end) (end, error) {
	e.serverPID = map[Placement]int{}
	var err error
	if e.nearIP, e.serverPID[Same], err = l.find(ctx, e.namespace, "near"); err != nil {
		return e, err
	}
	if e.farIP, e.serverPID[Cross], err = l.find(ctx, e.namespace, "far"); err != nil {
		return e, err
	}
	if e.clientIP, _, err = l.find(ctx, e.namespace, "client"); err != nil {
		return e, err
	}
	if l.Neighbours {
		e.otherIP, _, err = l.find(ctx, e.namespace, "other")
	}
	return e, err
}

// find is a pod's address and process.
func (l *Lab) find(ctx context.Context, ns, pod string) (ip string, pid int, err error) {
	out, err := l.do(ctx, "", "get", "pod", pod, "-n", ns, "-o", "json")
	if err != nil {
		return "", 0, err
	}
	var p struct {
		Status struct {
			PodIP             string
			ContainerStatuses []struct{ ContainerID string }
		}
	}
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		return "", 0, fmt.Errorf("read pod %s: %w", pod, err)
	}
	if len(p.Status.ContainerStatuses) != 1 {
		return "", 0, fmt.Errorf("pod %s/%s has no container", ns, pod)
	}
	if _, err := fmt.Sscanf(p.Status.ContainerStatuses[0].ContainerID, "lab://%d", &pid); err != nil {
		return "", 0, fmt.Errorf("read process of pod %s/%s: %w", ns, pod, err)
	}
	return p.Status.PodIP, pid, nil
}

// Path is how a mode connects two pods.
func (l *Lab) Path(mode string, p Placement) (Path, bool) {
	path, ok := l.paths[mode+string(p)]
	return path, ok
}

// Run runs a load over a path; the spec's server and processes are filled in. With
// Config.Profile it takes profiles meanwhile.
func (l *Lab) Run(ctx context.Context, p Path, s load.Spec) (load.Result, error) {
	s.Server, s.Watch = p.Server, p.watched(Beside(s.Beside), l.control)
	if s.Kind == load.Enrol {
		s.Watch = l.withAgent(p, s.Watch)
	}
	where := []string{"exec", "client", "-n", p.Namespace}
	if s.Kind == load.Handshake || s.Kind == load.Tunnel {
		if err := l.asMember(ctx, p, &s); err != nil {
			return load.Result{}, err
		}
		where = []string{"exec", p.Near} // what a node sends goes without its proxy
	}
	b, err := json.Marshal(s)
	if err != nil {
		return load.Result{}, err
	}
	profiled := l.profile(ctx, p, s)
	out, err := l.do(ctx, "", append(where, "--", l.Self, Client, string(b))...)
	if err := errors.Join(err, profiled()); err != nil {
		return load.Result{}, err
	}
	var r load.Result
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return r, fmt.Errorf("read what the client measured: %w", err)
	}
	l.heaps(ctx, r)
	return r, nil
}

// Agreed is what TLS the path's server agreed to, each answer once.
func (l *Lab) Agreed(p Path) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []string
	for _, a := range l.agreed {
		if s := a.String(); a.Server.String() == p.TLSServer && (p.TLSClient == "" || p.TLSClient == a.Client.String()) && !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	slices.Sort(out)
	return out
}

var errNotProved = errors.New("not seen")
