package app

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
	"github.com/ambit-mesh/ambit/test/lab/control"
	"github.com/ambit-mesh/ambit/test/lab/process"
	"github.com/ambit-mesh/ambit/test/lab/sandbox"
)

// call is one command of the command line.
type call struct {
	control.Request
	app     *App
	files   []*os.File
	signals <-chan syscall.Signal
	w       *control.Writer
}

// command answers one.
func (a *App) command(ctx context.Context, r control.Request, files []*os.File, signals <-chan syscall.Signal, w *control.Writer) int {
	c := &call{r, a, files, signals, w}
	verbs := map[string]func(context.Context) (int, error){
		"ready": c.ready, "exec": c.exec, "apply": c.apply, "delete": c.delete, "get": c.get, "label": c.label, "annotate": c.label,
		"logs": c.logs, "restart": c.restart, "kill": c.kill, "status": c.status, "down": c.down, "wait": c.wait,
		"capture": c.capture, "programs": c.programs,
	}
	f, ok := verbs[r.Verb]
	if !ok {
		w.Errorf("the lab does not know the command %q", r.Verb)
		return 2
	}
	code, err := f(ctx)
	if err != nil {
		w.Errorf("%v", err)
		return cmp.Or(code, 1)
	}
	return code
}

func (c *call) ns() string { return cmp.Or(c.Flags["namespace"], "default") }

// ready waits until the lab is up.
func (c *call) ready(ctx context.Context) (int, error) {
	select {
	case <-c.app.readyc:
		return 0, nil
	case <-c.app.faultc:
		return 1, c.app.lastFault()
	case <-ctx.Done():
		return 1, context.Cause(ctx)
	}
}

func (c *call) down(context.Context) (int, error) {
	c.app.down()
	return 0, nil
}

func (a *App) down() { a.cancel(errDown) }

// exec runs a command in a pod or on a machine with the caller's own terminal.
func (c *call) exec(ctx context.Context) (int, error) {
	if len(c.Args) < 2 || len(c.files) != 3 {
		return 2, errors.New("exec wants POD or NODE, and a command after --")
	}
	name, argv := c.Args[0], c.Args[1:]
	p, err := c.startIn(name, argv)
	if err != nil {
		return 1, err
	}
	for {
		select {
		case <-p.Done():
			code, _ := p.Exit()
			return code, nil
		case s := <-c.signals:
			_ = p.Signal(s) // it may have just ended
		case <-ctx.Done():
			p.Stop(0)
			return 130, nil
		}
	}
}

func (c *call) startIn(name string, argv []string) (*process.Process, error) {
	a := c.app
	if m, ok := a.net.Machine(name); ok {
		if argv[0] == "ambit-sample" {
			argv = append([]string{filepath.Join(a.Bin, "ambit-sample")}, argv[1:]...)
		}
		if argv[0] == "ambit-node" && a.mesh != nil {
			argv = a.mesh.AgentCommand(m.Name, argv[1:])
		}
		env := append(os.Environ(), "PATH="+toolPath(a.Bin))
		return process.Start(process.Spec{Argv: argv, Env: env, NetNS: m.Path(), Cgroup: sandbox.NodeCgroup(m.Name)}, c.files[0], c.files[1], c.files[2])
	}
	ns, pod, err := c.pod(name)
	if err != nil {
		return nil, err
	}
	return a.kubelet.Exec(ns, pod, c.Flags["container"], argv, c.files[0], c.files[1], c.files[2])
}

// pod resolves POD, NS/POD or deploy/NAME: a name that is no pod stands for the
// first ready pod it starts, so that nobody has to look up hashes.
func (c *call) pod(name string) (string, string, error) {
	ns := c.ns()
	if before, after, ok := strings.Cut(name, "/"); ok {
		if kind, known := c.app.store.KindFor(before); known && kind != "Namespace" {
			name = after
		} else {
			ns, name = before, after
		}
	}
	if _, ok := cluster.Get[*corev1.Pod](c.app.store, ns, name); ok {
		return ns, name, nil
	}
	best := ""
	for _, p := range cluster.List[*corev1.Pod](c.app.store, ns) {
		if p.DeletionTimestamp == nil && (strings.HasPrefix(p.Name, name+"-") || p.Labels["app"] == name) && (best == "" || p.Status.Phase == corev1.PodRunning) {
			best = p.Name
			if p.Status.Phase == corev1.PodRunning {
				break
			}
		}
	}
	if best == "" {
		return "", "", fmt.Errorf("no pod %q in namespace %q; get pods -A lists them", name, ns)
	}
	return ns, best, nil
}

// apply stores objects and says what ambitd thinks of them.
func (c *call) apply(ctx context.Context) (int, error) {
	objects, err := cluster.Decode(bytes.NewReader(c.Input), cmp.Or(c.Flags["filename"], "input"))
	if len(objects) == 0 && err == nil {
		return 1, errors.New("nothing to apply")
	}
	var keys []cluster.Key
	for _, o := range objects {
		if o.GetNamespace() == "" {
			o.SetNamespace(c.ns())
		}
		outcome, applyErr := c.app.applyOne(ctx, o)
		if applyErr != nil {
			err = errors.Join(err, applyErr)
			continue
		}
		keys = append(keys, cluster.KeyOf(o))
		c.w.Printf("%s/%s %s\n", strings.ToLower(cluster.KindOf(o)), o.GetName(), outcome)
	}
	if c.app.mesh != nil {
		c.tellProblems(ctx, keys)
	}
	return 0, err
}

func (a *App) applyOne(ctx context.Context, o cluster.Object) (cluster.Outcome, error) {
	pod, ok := o.(*corev1.Pod)
	if !ok {
		return a.store.Apply(o)
	}
	// A running pod's spec does not change: another spec is another pod.
	hash := fmt.Sprintf("%x", sum(pod.Spec))
	old, exists := cluster.Get[*corev1.Pod](a.store, pod.Namespace, pod.Name)
	if exists && old.Annotations[cluster.SpecHash] != hash {
		if err := a.store.Delete(cluster.KeyOf(old)); err != nil {
			return "", err
		}
		if err := a.gone(ctx, cluster.KeyOf(old)); err != nil {
			return "", err
		}
	}
	if pod.Annotations == nil {
		pod.Annotations = map[string]string{}
	}
	pod.Annotations[cluster.SpecHash] = hash
	outcome, err := a.store.Apply(pod)
	if err == nil && exists && outcome == cluster.Created {
		outcome = cluster.Configured
	}
	return outcome, err
}

// gone waits until an object is no longer there.
func (a *App) gone(ctx context.Context, k cluster.Key) error {
	wakec, stop := a.store.Watch()
	defer stop()
	for {
		if _, ok := a.store.Get(k); !ok {
			return nil
		}
		select {
		case <-wakec:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// tellProblems asks ambitd until it has read what was just published.
func (c *call) tellProblems(ctx context.Context, keys []cluster.Key) {
	raw := false
	for _, k := range keys {
		known := false
		for _, kind := range cluster.Kinds {
			known = known || kind.Name == k.Kind
		}
		raw = raw || !known || k.Kind == "Service" || k.Kind == "ConfigMap"
	}
	if !raw {
		return
	}
	// ambitd reads a changed directory after a short pause that collects changes.
	for range 4 {
		select {
		case <-time.After(75 * time.Millisecond):
		case <-ctx.Done():
			return
		}
		problems, err := c.app.mesh.Problems(ctx)
		if err != nil {
			c.w.Errorf("warning: ambitd does not say whether it accepts this: %v", err)
			return
		}
		told := false
		for _, p := range problems {
			for _, k := range keys {
				if p.Kind == k.Kind && p.Name == k.Name && p.Namespace == k.Namespace {
					c.w.Errorf("warning: %s", p)
					told = true
				}
			}
		}
		if told {
			return
		}
	}
}

func (c *call) delete(ctx context.Context) (int, error) {
	var keys []cluster.Key
	if len(c.Input) > 0 {
		objects, err := cluster.Decode(bytes.NewReader(c.Input), cmp.Or(c.Flags["filename"], "input"))
		if err != nil {
			return 1, err
		}
		for _, o := range objects {
			k := cluster.KeyOf(o)
			if k.Namespace == "" && !clusterScoped(k.Kind) {
				k.Namespace = c.ns()
			}
			keys = append(keys, k)
		}
	} else {
		if len(c.Args) < 2 {
			return 2, errors.New("delete wants -f FILE, or KIND and one or more NAMEs")
		}
		kind, ok := c.app.store.KindFor(c.Args[0])
		if !ok {
			return 1, fmt.Errorf("there is no %q in the lab", c.Args[0])
		}
		for _, name := range c.Args[1:] {
			k := cluster.Key{Kind: kind, Namespace: c.ns(), Name: name}
			if clusterScoped(kind) {
				k.Namespace = ""
			}
			keys = append(keys, k)
		}
	}
	var errs []error
	for _, k := range keys {
		if err := c.app.remove(k); err != nil {
			errs = append(errs, err)
			continue
		}
		c.w.Printf("%s %q deleted\n", strings.ToLower(k.Kind), k.Name)
	}
	if len(errs) > 0 {
		return 1, errors.Join(errs...)
	}
	for _, k := range keys {
		if k.Kind == "Pod" {
			if err := c.app.gone(ctx, k); err != nil {
				return 1, err
			}
		}
	}
	return 0, nil
}

func clusterScoped(kind string) bool {
	for _, k := range cluster.Kinds {
		if k.Name == kind {
			return k.Cluster
		}
	}
	return kind == "GatewayClass"
}

// remove deletes an object; a namespace goes with all that is in it.
func (a *App) remove(k cluster.Key) error {
	if k.Kind != "Namespace" {
		return a.store.Delete(k)
	}
	errs := []error{a.store.Delete(k)}
	for _, o := range a.store.All() {
		if o.Namespace == k.Name {
			errs = append(errs, a.store.Delete(o))
		}
	}
	return errors.Join(errs...)
}

// label sets labels or annotations: KIND NAME key=value key-.
func (c *call) label(ctx context.Context) (int, error) {
	if len(c.Args) < 3 {
		return 2, fmt.Errorf("%s wants KIND NAME KEY=VALUE or KEY-", c.Verb)
	}
	kind, ok := c.app.store.KindFor(c.Args[0])
	if !ok {
		return 1, fmt.Errorf("there is no %q in the lab", c.Args[0])
	}
	k := cluster.Key{Kind: kind, Namespace: c.ns(), Name: c.Args[1]}
	if clusterScoped(kind) {
		k.Namespace = ""
	}
	set := map[string]*string{}
	for _, word := range c.Args[2:] {
		if key, value, ok := strings.Cut(word, "="); ok {
			set[key] = &value
		} else if key, ok := strings.CutSuffix(word, "-"); ok {
			set[key] = nil
		} else {
			return 2, fmt.Errorf("%q is neither KEY=VALUE nor KEY-", word)
		}
	}
	if err := c.app.store.Mark(k, c.Verb == "annotate", set); err != nil {
		return 1, err
	}
	c.w.Printf("%s/%s %s\n", strings.ToLower(kind), c.Args[1], map[string]string{"label": "labeled", "annotate": "annotated"}[c.Verb])
	if c.app.mesh != nil {
		c.tellProblems(ctx, []cluster.Key{k})
	}
	return 0, nil
}

func parseSignal(s string) (syscall.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil && n > 0 && n < 65 {
		return syscall.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n != 0 {
		return n, nil
	}
	return 0, fmt.Errorf("no signal %q", s)
}

// kill sends a signal to a component's process or a pod's containers.
func (c *call) kill(ctx context.Context) (int, error) {
	if len(c.Args) != 1 {
		return 2, errors.New("kill wants the name of a component (status lists them) or pod")
	}
	sig, err := parseSignal(cmp.Or(c.Flags["signal"], "TERM"))
	if err != nil {
		return 2, err
	}
	return c.signal(ctx, sig, false)
}

// restart ends a component, as a rollout would, and waits for the next one.
func (c *call) restart(ctx context.Context) (int, error) {
	if len(c.Args) != 1 {
		return 2, errors.New("restart wants the name of a component or pod")
	}
	if _, rolling := c.Flags["rolling"]; rolling {
		if c.app.mesh != nil {
			if comp, ok := c.app.mesh.Component(c.Args[0]); ok {
				return 0, comp.Roll(ctx)
			}
		}
		return 2, fmt.Errorf("restart --rolling wants the name of a component; %q is none", c.Args[0])
	}
	return c.signal(ctx, syscall.SIGTERM, true)
}

func (c *call) signal(ctx context.Context, sig syscall.Signal, wait bool) (int, error) {
	if c.app.mesh != nil {
		if comp, ok := c.app.mesh.Component(c.Args[0]); ok {
			if !wait {
				if err := comp.Signal(sig); err != nil {
					return 1, fmt.Errorf("signal %s: %w (it starts again by itself)", comp.Name, err)
				}
				return 0, nil
			}
			if err := comp.Restart(ctx, sig); err != nil {
				return 1, err
			}
			return 0, c.app.mesh.Await(ctx, comp)
		}
	}
	ns, pod, err := c.pod(c.Args[0])
	if err != nil {
		return 1, err
	}
	return 0, c.app.kubelet.Signal(ns, pod, sig)
}

// logs prints a pod's or a component's log; -f follows.
func (c *call) logs(ctx context.Context) (int, error) {
	if len(c.Args) != 1 {
		return 2, errors.New("logs wants the name of a pod or component (status lists them), or lab")
	}
	path, err := c.logFile(c.Args[0])
	if err != nil {
		return 1, err
	}
	f, err := os.Open(path)
	if err != nil {
		return 1, fmt.Errorf("%s has written nothing yet", c.Args[0])
	}
	defer f.Close()
	if n, err := strconv.Atoi(c.Flags["tail"]); err == nil && n >= 0 {
		if err := seekTail(f, n); err != nil {
			return 1, err
		}
	}
	buf := make([]byte, 64<<10)
	for {
		n, _ := f.Read(buf) // at the end of the file: nothing yet
		if n > 0 {
			if _, err := c.w.Write(buf[:n]); err != nil {
				return 1, err
			}
			continue
		}
		if c.Flags["follow"] == "" {
			return 0, nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return 0, nil
		}
	}
}

// seekTail moves to the start of the last n lines.
func seekTail(f *os.File, n int) error {
	b, err := os.ReadFile(f.Name())
	if err != nil {
		return err
	}
	end := len(bytes.TrimSuffix(b, []byte("\n")))
	for ; n > 0 && end >= 0; n-- {
		end = bytes.LastIndexByte(b[:max(end, 0)], '\n')
	}
	_, err = f.Seek(int64(end+1), 0)
	return err
}

func (c *call) logFile(name string) (string, error) {
	if name == "lab" {
		return LogFile, nil
	}
	if c.app.mesh != nil {
		if comp, ok := c.app.mesh.Component(name); ok {
			return comp.LogFile, nil
		}
	}
	ns, pod, err := c.pod(name)
	if err != nil {
		return "", err
	}
	p, ok := cluster.Get[*corev1.Pod](c.app.store, ns, pod)
	if !ok || len(p.Spec.Containers) == 0 {
		return "", fmt.Errorf("pod %s/%s not found", ns, pod)
	}
	return c.app.kubelet.LogFile(ns, pod, cmp.Or(c.Flags["container"], p.Spec.Containers[0].Name)), nil
}

// LogFile is the daemon's own log, inside the sandbox.
const LogFile = sandbox.RunDir + "/lab.log"
