package topo

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/perf/load"
)

// tunnelPort is where node proxies meet.
const tunnelPort = 15008

// lay makes what a mode has between two pods and says what it is.
func (l *Lab) lay(ctx context.Context, mode string, e end, to Placement) (Path, error) {
	node, ip := e.far, e.farIP
	if to == Same {
		node, ip = e.near, e.nearIP
	}
	if to == Hop1 {
		return l.layHTTP(ctx, mode, e)
	}
	p := Path{Mode: mode, Placement: to, Namespace: e.namespace, Server: fmt.Sprintf("%s:%d", ip, load.Port), Near: e.near, Far: node}
	p.Watch = []load.Process{{Name: "server", PID: e.serverPID[to]}}
	var err error
	switch mode {
	case None:
		p.About = "client to server"
	case Relay:
		err = l.layRelay(ctx, &p, e.near, node)
	case TLS:
		err = l.layTLS(ctx, &p, e.near, node)
	default:
		err = l.layMesh(ctx, &p, e.near, node, ip, e.clientIP)
	}
	return p, err
}

// layRelay puts a hop on each node; two pods of one node share it, as they share a
// node proxy.
func (l *Lab) layRelay(ctx context.Context, p *Path, near, far string) error {
	p.About = "a Go relay on each node, plain TCP, splice"
	if near == far {
		p.About = "one Go relay on the node, plain TCP, splice"
		return l.addHop(ctx, p, near, load.Hop{To: p.Server})
	}
	if err := l.addHop(ctx, p, far, load.Hop{To: p.Server}); err != nil {
		return err
	}
	return l.addHop(ctx, p, near, load.Hop{To: p.Server})
}

func (l *Lab) layTLS(ctx context.Context, p *Path, near, far string) error {
	p.About = "a Go relay for each side, mutual crypto/tls between them, 64 KiB buffers, no resumption"
	pair, err := load.NewPair()
	if err != nil {
		return err
	}
	if err := l.addHop(ctx, p, far, load.Hop{To: p.Server, TLSIn: true, Pair: pair}); err != nil {
		return err
	}
	p.TLSServer = p.Server
	return l.addHop(ctx, p, near, load.Hop{To: p.Server, TLSOut: true, Pair: pair})
}

// addHop starts a hop on a node and makes it what the path's client dials.
func (l *Lab) addHop(ctx context.Context, p *Path, node string, h load.Hop) error {
	addr, err := l.nodeAddr(ctx, node)
	if err != nil {
		return err
	}
	h.Listen = addr + ":0"
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	started, _, err := l.begin(ctx, node, Hop, string(b))
	if err != nil {
		return err
	}
	p.Server = started.Addr
	p.Watch = append(p.Watch, load.Process{Name: "hop@" + node, PID: started.PID, Proxy: true})
	p.Commands = append(p.Commands, filepath.Base(l.Self)+" "+Hop)
	p.Version, p.Logs = "as "+filepath.Base(l.Self), "no access log"
	if h.TLSIn || h.TLSOut {
		p.Records = "crypto/tls"
	}
	return nil
}

func (l *Lab) nodeAddr(ctx context.Context, node string) (string, error) {
	out, err := l.do(ctx, "", "get", "node", node, "-o", "json")
	if err != nil {
		return "", err
	}
	var n struct {
		Status struct {
			Addresses []struct{ Type, Address string }
		}
	}
	if err := json.Unmarshal([]byte(out), &n); err != nil {
		return "", fmt.Errorf("read node %s: %w", node, err)
	}
	for _, a := range n.Status.Addresses {
		if a.Type == "InternalIP" && !strings.Contains(a.Address, ":") {
			return a.Address, nil
		}
	}
	return "", fmt.Errorf("node %s has no IPv4 address", node)
}

// begin starts a verb of ours on a node and reads its first line; what follows is
// for the caller to read.
func (l *Lab) begin(ctx context.Context, node string, verb ...string) (load.Started, *bufio.Reader, error) {
	var s load.Started
	r, err := l.beginAs(ctx, &s, nil, node, verb...)
	return s, r, err
}

func (l *Lab) beginAs(ctx context.Context, s any, stdin io.Reader, node string, verb ...string) (*bufio.Reader, error) {
	// It ends with the lab, not with ctx: the lab's end is what stops it.
	cmd := l.command(context.WithoutCancel(ctx), append([]string{"exec", node, "--", l.Self}, verb...)...)
	var said bytes.Buffer // the lab's end is no news
	cmd.Stdin, cmd.Stderr = stdin, &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	r := bufio.NewReader(out)
	line, err := r.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, s)
	}
	if err != nil {
		_ = cmd.Wait() // what it said tells more
		return nil, fmt.Errorf("start %s on %s: %w: %s", verb[0], node, err, bytes.TrimSpace(said.Bytes()))
	}
	l.behind = append(l.behind, cmd)
	return r, nil
}

// watchHandshakes listens on every node for what servers agree to.
func (l *Lab) watchHandshakes(ctx context.Context) error {
	nodes := map[string]bool{}
	for _, e := range l.ends {
		nodes[e.near], nodes[e.far] = true, true
	}
	for node := range nodes {
		_, r, err := l.begin(ctx, node, Hellos)
		if err != nil {
			return err
		}
		go func() { // ends with its process
			for dec := json.NewDecoder(r); ; {
				var a load.Agreed
				if dec.Decode(&a) != nil {
					return
				}
				l.mu.Lock()
				if !slices.Contains(l.agreed, a) {
					l.agreed = append(l.agreed, a)
				}
				l.mu.Unlock()
			}
		}()
	}
	return nil
}

// layMesh finds the node proxies.
func (l *Lab) layMesh(ctx context.Context, p *Path, near, far, ip, client string) error {
	status, err := l.status(ctx)
	if err != nil {
		return err
	}
	l.locateParts(status)
	nodes := slices.Compact([]string{near, far})
	for _, node := range nodes {
		name := "ztunnel@" + node
		if pid := status.pid(name); pid != 0 {
			p.Watch = append(p.Watch, load.Process{Name: name, PID: pid, Proxy: true})
		}
	}
	if len(p.Watch) != 1+len(nodes) {
		return fmt.Errorf("no node proxy runs on %s", strings.Join(nodes, " or "))
	}
	p.Meshed = true
	p.Targets = l.targets(ctx, status, p.Watch[1:])
	// Two processes share the node's network here. Ours listen where they are told
	// to; the ports of others are fixed.
	p.Rolls = len(p.Targets) == 1+len(nodes)
	for _, r := range status.Redirect {
		if r.Node == near {
			p.About = "HBONE between node proxies, redirected by " + r.Redirector
		}
	}
	program := filepath.Join(l.Bin, "ztunnel")
	if other, ok := l.Peers[p.Mode]; ok {
		program = other.Program
	}
	switch {
	case p.Mode == Accelerated:
		p.About = "authorized by the node proxy once, then pod to pod under a lease"
	case near == far:
		// What a proxy does between pods of its own node is its business; a
		// handshake is reported where there is one.
		p.About = strings.Replace(p.About, "HBONE between node proxies", "the node's proxy", 1)
		fallthrough
	default:
		// The client's proxy dials from the client's pod; whoever else makes handshakes
		// in the lab has other addresses.
		p.TLSServer, p.TLSClient = fmt.Sprintf("%s:%d", ip, tunnelPort), client
	}
	p.Version = version(ctx, program)
	for _, w := range p.Watch[1:] {
		argv, env, err := l.started(ctx, near, w.PID)
		if err != nil {
			return err
		}
		if command := strings.Join(argv, " "); !slices.Contains(p.Commands, command) {
			p.Commands = append(p.Commands, command)
		}
		if p.Settings == "" {
			p.Settings = strings.Join(env, "\n") + "\n"
		}
	}
	p.Logs = "access log, metrics"
	if slices.Contains(l.Env, NoAccessLog) {
		p.Logs = "no access log, metrics"
	}
	p.Records = cmp.Or(l.records(ctx, p.Watch[1].PID), "its own")
	return nil
}

// NoAccessLog is the setting by which our proxy and its reference write none.
const NoAccessLog = "RUST_LOG=info,access=off"

// started is what a process of the lab was started with: its command line, and the
// variables that this process has not got.
func (l *Lab) started(ctx context.Context, node string, pid int) (argv, env []string, err error) {
	for _, f := range []struct {
		name string
		to   *[]string
	}{{"cmdline", &argv}, {"environ", &env}} {
		out, err := l.do(ctx, "", "exec", node, "--", "cat", fmt.Sprintf("/proc/%d/%s", pid, f.name))
		if err != nil {
			return nil, nil, err
		}
		*f.to = strings.Split(strings.TrimRight(out, "\x00"), "\x00")
	}
	own := os.Environ()
	env = slices.DeleteFunc(env, func(v string) bool { return slices.Contains(own, v) || strings.HasPrefix(v, "PATH=") })
	slices.Sort(env)
	return argv, env, nil
}

// records is who a proxy says protects its TLS records; "": it does not say so.
func (l *Lab) records(ctx context.Context, pid int) string {
	b, err := l.asks.Get(ctx, pid, "http://"+proxyAdmin+"/config_dump")
	if err != nil {
		return ""
	}
	var dump struct {
		Config struct {
			Records string `json:"TLS_RECORDS"`
		} `json:"config"`
	}
	if json.Unmarshal(b, &dump) != nil {
		return "" // another's dump has another shape
	}
	return dump.Config.Records
}

// version is what a program says of itself.
func version(ctx context.Context, program string) string {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	for _, arg := range []string{"version", "--version"} {
		out, err := exec.CommandContext(ctx, program, arg).Output()
		if line := strings.Join(strings.Fields(string(out)), " "); err == nil && line != "" {
			return line
		}
	}
	return "unknown"
}

// prove runs small loads until the path is what it claims to be: encrypted where
// it says so, without the proxy where it says so.
func (l *Lab) prove(ctx context.Context, p Path) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("30 seconds were not enough"))
	defer cancel()
	var last error
	for {
		err := l.tryPath(ctx, p)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || last == nil {
			last = err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), last)
		}
	}
}

func (l *Lab) tryPath(ctx context.Context, p Path) error {
	kind := load.Connect
	if p.Placement == Hop1 {
		kind = load.HTTP
	}
	r, err := l.Run(ctx, p, load.Spec{Kind: kind, Conns: 1, Size: 64, For: 30 * time.Millisecond})
	if err != nil {
		return err
	}
	if r.Ops == 0 || r.Errors > 0 {
		return fmt.Errorf("%d requests, %d errors: %s", r.Ops, r.Errors, r.Error)
	}
	if p.Placement == Cross && p.TLSServer != "" && len(l.Agreed(p)) == 0 {
		return fmt.Errorf("a TLS handshake of %s: %w", p.TLSServer, errNotProved)
	}
	if p.Mode == Accelerated {
		return l.direct(ctx, p)
	}
	return nil
}

// direct proves that the proxy has no part in the path: it sleeps while bytes flow.
func (l *Lab) direct(ctx context.Context, p Path) error {
	r, err := l.Run(ctx, p, load.Spec{Kind: load.Down, Conns: 1, Size: 64 << 10, For: 50 * time.Millisecond})
	if err != nil {
		return err
	}
	for _, u := range r.Usage {
		if u.Proxy && u.CPU > r.Elapsed/10 {
			return fmt.Errorf("a direct connection, the proxy was busy for %s of %s: %w", u.CPU, r.Elapsed, errNotProved)
		}
	}
	return nil
}
