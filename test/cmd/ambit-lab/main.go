// Command ambit-lab runs a Kubernetes-like cluster with the mesh in it on one
// Linux machine: nodes are network namespaces, pods are processes, the mesh's
// programs are the real ones. Nothing of it outlives its first process.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/ambit-mesh/ambit/test/lab/control"
	"github.com/ambit-mesh/ambit/test/lab/process"
	"github.com/ambit-mesh/ambit/test/lab/sandbox"
	"github.com/ambit-mesh/ambit/xds/boot"
)

const usage = `Usage: ambit-lab [--name LAB] COMMAND

  up [-f DIR] [--nodes 2] [--no-mesh]    start a lab
     [--redirect auto|ebpf|nftables]     how connections get to the proxies; auto: eBPF where it works
     [--ztunnel NODE=PROGRAM]            with another proxy on a node
     [--env NAME=VALUE]                  and more settings for all proxies
  demo                                   start one, show the mesh at work, end it
  status [-o json]                       what runs
  down                                   end it; nothing stays
  hold                                   end it when standard input ends: for programs that start labs

  apply -f FILE|DIR|-                    as kubectl does; also bookinfo and echo, built in
  delete -f FILE|-  |  delete KIND NAME
  get KIND [NAME] [-n NS|-A] [-l SEL] [-o yaml|json|wide|name]
  label|annotate KIND NAME KEY=VALUE KEY-
  wait [-n NS|-A] [--timeout 60s]        until all pods are ready
  exec POD|NODE [-n NS] [-c CONTAINER] -- CMD...
  programs NODE                          what the node's agent has the kernel run, and where
  capture [--timeout 10s] [-o json]      each TCP connection that begins, on every interface but loopback
  logs POD|COMPONENT [-f] [--tail N]     components: status lists them; lab: the lab's own
  restart COMPONENT|POD [--rolling]      --rolling: the next one serves before the old one ends
  kill COMPONENT|POD [-s SIGNAL]
  version

A POD may also be named by its app or Deployment: exec sleep -- curl reviews:9080/health
`

func main() {
	// Debian keeps nft and others out of an ordinary user's PATH.
	_ = os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin") // a valid name always works
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case process.Verb:
			os.Exit(process.Enter())
		case sandbox.InitVerb:
			if len(os.Args) > 2 {
				os.Exit(sandbox.Init(os.Args[2], append([]string{daemonVerb}, os.Args[3:]...), daemonFiles))
			}
		case sandbox.SweepVerb:
			if len(os.Args) == 3 {
				os.Exit(sandbox.SweepMain(os.Args[2]))
			}
		case sandbox.ProbeVerb:
			os.Exit(sandbox.ProbeMain())
		case daemonVerb:
			os.Exit(daemon(os.Args[2:]))
		}
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// options are the flags of all commands.
type options struct {
	name, file, namespace, container, output, selector, tail, timeout, signal string
	all, follow, noMesh, rolling                                              bool
	nodes                                                                     int
	secretTTL, redirect                                                       string
	ztunnel                                                                   programs
	env                                                                       variables
}

// programs are node=PROGRAM flags.
type programs map[string]string

func (p *programs) String() string { return "" }

func (p *programs) Set(s string) error {
	node, program, ok := strings.Cut(s, "=")
	if !ok {
		return errors.New("want NODE=PROGRAM")
	}
	program, err := filepath.Abs(program)
	if err != nil {
		return err
	}
	if _, err := os.Stat(program); err != nil {
		return err
	}
	if *p == nil {
		*p = programs{}
	}
	(*p)[node] = program
	return nil
}

// variables are NAME=VALUE flags.
type variables []string

func (v *variables) String() string { return "" }

func (v *variables) Set(s string) error {
	if !strings.Contains(s, "=") {
		return errors.New("want NAME=VALUE")
	}
	*v = append(*v, s)
	return nil
}

func (o *options) set(stderr io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet("ambit-lab", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() { fmt.Fprint(stderr, usage) }
	fs.StringVar(&o.name, "name", o.name, "name of the lab")
	for _, n := range []string{"f", "filename"} {
		fs.StringVar(&o.file, n, o.file, "file, directory or -")
	}
	for _, n := range []string{"n", "namespace"} {
		fs.StringVar(&o.namespace, n, o.namespace, "namespace")
	}
	for _, n := range []string{"A", "all-namespaces"} {
		fs.BoolVar(&o.all, n, o.all, "all namespaces")
	}
	fs.StringVar(&o.container, "c", o.container, "container")
	fs.StringVar(&o.output, "o", o.output, "yaml, json, name or wide")
	fs.StringVar(&o.selector, "l", o.selector, "label selector")
	fs.StringVar(&o.tail, "tail", o.tail, "last lines only")
	fs.StringVar(&o.timeout, "timeout", o.timeout, "how long to wait")
	fs.StringVar(&o.signal, "s", o.signal, "signal")
	fs.BoolVar(&o.noMesh, "no-mesh", o.noMesh, "pods, services and DNS only")
	fs.BoolVar(&o.rolling, "rolling", o.rolling, "replace a component without a gap")
	fs.IntVar(&o.nodes, "nodes", o.nodes, "number of nodes")
	fs.StringVar(&o.redirect, "redirect", o.redirect, "auto, ebpf or nftables")
	fs.StringVar(&o.secretTTL, "secret-ttl", o.secretTTL, "lifetime of workload certificates")
	fs.Var(&o.ztunnel, "ztunnel", "node=PROGRAM: another proxy on a node")
	fs.Var(&o.env, "env", "NAME=VALUE for every ztunnel")
	return fs
}

// parse accepts flags before, between and after arguments, as kubectl does; what
// follows -- is left alone.
func (o *options) parse(args []string, stderr io.Writer) (words []string, err error) {
	var command []string
	for i, a := range args {
		if a == "--" {
			args, command = args[:i], args[i+1:]
			break
		}
	}
	// -f follows a log and names a file elsewhere; -it comes from habit.
	logs := false
	var kept []string
	for _, a := range args {
		logs = logs || a == "logs"
		if logs && (a == "-f" || a == "--follow") {
			o.follow = true
			continue
		}
		if a == "-i" || a == "-t" || a == "-it" || a == "-ti" {
			continue
		}
		kept = append(kept, a)
	}
	for len(kept) > 0 {
		fs := o.set(stderr)
		if err := fs.Parse(kept); err != nil {
			return nil, err
		}
		kept = fs.Args()
		if len(kept) > 0 {
			words, kept = append(words, kept[0]), kept[1:]
		}
	}
	return append(words, command...), nil
}

func run(args []string, stdout, stderr io.Writer) int {
	o := options{name: "default", nodes: 2, redirect: "auto"}
	words, err := o.parse(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		return 2
	}
	if len(words) == 0 {
		fmt.Fprint(stderr, usage)
		return 2
	}
	verb, words := words[0], words[1:]
	switch verb {
	case "version":
		if err := boot.PrintVersion(stdout, "ambit-lab", words); err != nil {
			return fail(stderr, 2, err)
		}
		return 0
	case "help":
		fmt.Fprint(stdout, usage)
		return 0
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	switch verb {
	case "up":
		return up(ctx, o, stdout, stderr)
	case "demo":
		return demo(ctx, o, stdout, stderr)
	case "down":
		code, err := down(ctx, o.name, stdout, stderr)
		if err != nil {
			return fail(stderr, code, err)
		}
		return code
	case "hold":
		return holdCommand(o.name, os.Stdin, stderr)
	}
	r, files, err := o.request(verb, words)
	if err != nil {
		return fail(stderr, 2, err)
	}
	if verb == "exec" || verb == "capture" {
		ctx = context.Background() // signals are the command's
		signal.Ignore(syscall.SIGPIPE)
	}
	code, err := control.Do(ctx, o.name, r, files, stdout, stderr)
	if err != nil && ctx.Err() == nil {
		return fail(stderr, max(code, 1), err)
	}
	return code
}

func fail(stderr io.Writer, code int, err error) int {
	fmt.Fprintln(stderr, "ambit-lab:", err)
	return code
}

// request makes the command for the daemon.
func (o *options) request(verb string, words []string) (control.Request, []*os.File, error) {
	r := control.Request{Verb: verb, Args: words, Flags: map[string]string{}}
	for k, v := range map[string]string{"namespace": o.namespace, "container": o.container, "output": o.output, "selector": o.selector,
		"tail": o.tail, "timeout": o.timeout, "signal": o.signal, "filename": o.file} {
		if v != "" {
			r.Flags[k] = v
		}
	}
	if o.all {
		r.Flags["all-namespaces"] = "true"
	}
	if o.rolling {
		r.Flags["rolling"] = "true"
	}
	if o.follow {
		r.Flags["follow"] = "true"
	}
	switch verb {
	case "exec", "capture":
		return r, []*os.File{os.Stdin, os.Stdout, os.Stderr}, nil
	case "apply", "delete":
		if o.file == "" && verb == "apply" {
			return r, nil, errors.New("apply wants -f FILE, DIR, - or the name of a built-in: " + strings.Join(builtinNames(), ", "))
		}
		if o.file != "" {
			var err error
			r.Input, err = manifests(o.file)
			return r, nil, err
		}
	}
	return r, nil, nil
}

// manifests reads a file, all YAML files of a directory, standard input, or one of
// the manifests that the lab carries.
func manifests(name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(os.Stdin)
	}
	st, err := os.Stat(name)
	if err != nil {
		if b, builtin := builtinManifest(name); builtin {
			return b, nil
		}
		return nil, err
	}
	if !st.IsDir() {
		return os.ReadFile(name)
	}
	var all []byte
	err = filepath.WalkDir(name, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".yaml" && filepath.Ext(path) != ".yml" && filepath.Ext(path) != ".json" {
			return err
		}
		b, err := os.ReadFile(path)
		all = append(append(all, b...), "\n---\n"...)
		return err
	})
	return all, err
}
