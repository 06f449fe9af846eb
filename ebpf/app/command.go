package app

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/xds/boot"
)

func usage() string {
	return `ambit-node brings the pods of its node into the mesh.

  ambit-node [run] --source dir:PATH --node NAME   run the agent
  ambit-node status [-o json]                      list the node's pods in the mesh
  ambit-node flows [-o json] [--pod NS/NAME]       list their live connections and what becomes of each; --watch goes on
  ambit-node cleanup                               take all of them out (agent stopped)
  ambit-node version

ambit-node COMMAND --help lists a command's flags.

As root it needs these capabilities, and says at its start which are missing:
` + capabilityList()
}

// Main runs one command and returns the exit status: 2 for wrong usage.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	name, rest := "run", args
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		name, rest = args[0], args[1:]
	} else if len(args) == 1 && (args[0] == "--help" || args[0] == "-h") {
		name = "help"
	}
	var err error
	switch name {
	case "run":
		err = runCommand(ctx, rest, stdout, stderr)
	case "status":
		err = statusCommand(rest, stdout, stderr)
	case "flows":
		err = flowsCommand(ctx, rest, stdout, stderr)
	case "cleanup":
		err = cleanupCommand(rest, stdout, stderr)
	case "version":
		err = boot.PrintVersion(stdout, "ambit-node", rest)
	case "help":
		fmt.Fprint(stdout, usage())
	default:
		fmt.Fprintf(stderr, "ambit-node: no command %q\n\n%s", name, usage())
		return 2
	}
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		return 2 // it has been said
	default:
		fmt.Fprintf(stderr, "ambit-node %s: %v\n", name, err)
		return 1
	}
}

var errUsage = errors.New("wrong usage")

func parse(fs *flag.FlagSet, args []string) error {
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errUsage
	}
	if fs.NArg() > 0 {
		fmt.Fprintf(fs.Output(), "%s takes no argument %q\n", fs.Name(), fs.Arg(0))
		return errUsage
	}
	return nil
}

// wrong says what is wrong with a flag's value.
func wrong(fs *flag.FlagSet, format string, args ...any) error {
	fmt.Fprintf(fs.Output(), fs.Name()+": "+format+"\n", args...)
	return errUsage
}

func newFlagSet(name string, stderr io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet("ambit-node "+name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	return fs
}

func commonFlags(fs *flag.FlagSet, c *Config) {
	fs.StringVar(&c.StatusDir, "status-dir", "/var/run/ambit/status", "`directory` with one status file per pod")
	fs.StringVar(&c.BPFFSDir, "bpffs-dir", "/sys/fs/bpf/ambit", "`directory` on a BPF file system for eBPF programs, of this node alone")
	fs.StringVar(&c.LogLevel, "log-level", "info", "`level`, or scope=level pairs")
	fs.StringVar(&c.LogFormat, "log-format", "text", "text or json")
}

func runCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var c Config
	fs := newFlagSet("run", stderr)
	commonFlags(fs, &c)
	fs.StringVar(&c.Source, "source", "", "where pods come from: dir:`PATH`[,PATH...]")
	fs.StringVar(&c.Node, "node", "", "this node's `name`, as in pods' spec.nodeName")
	fs.StringVar(&c.CNISocket, "cni-socket", attach.DefaultSocket, "`socket` on which the CNI plugin asks whether pods may start; empty: none")
	fs.StringVar(&c.StateDir, "state-dir", attach.DefaultStateDir, "`directory`, on a disk, of what the CNI plugin and the next agent have to know; empty: none")
	fs.StringVar(&c.ZDSPath, "zds-path", "/var/run/ztunnel/ztunnel.sock", "`socket` on which ztunnel gets pods")
	fs.StringVar(&c.Redirect, "redirect", kindAuto, "how pods are captured: ebpf, nftables, or auto, which is eBPF where the node has all it takes")
	fs.StringVar(&c.CgroupRoot, "cgroup-root", "", "cgroup2 `directory` above all pods and ztunnel's pod (default: kubelet's)")
	fs.StringVar(&c.HealthAddr, "health-addr", "127.0.0.1:15022", "`address` of /healthz/ready, /metrics, /logging and /debug; empty: none")
	fs.BoolVar(&c.HostProbes, "host-probes", true, "let the node's own connections (kubelet probes) reach enrolled pods outside the mesh")
	fs.BoolVar(&c.DNSCapture, "dns-capture", true, "pods' DNS goes through ztunnel where it answers DNS; the pod annotation ambient.istio.io/dns-capture wins")
	fs.DurationVar(&c.Propagation, "unenrol-propagation", time.Second, "how long peers get to learn that a pod left before its proxy stops")
	fs.DurationVar(&c.Drain, "unenrol-drain", handoff.DrainTime, "how long a leaving pod's proxied connections keep their way back; at least ztunnel's CONNECTION_TERMINATION_DEADLINE")
	fs.BoolVar(&c.CleanupOnExit, "cleanup-on-exit", false, "take all pods out of the mesh when the agent ends")
	excluded := fs.String("exclude-namespaces", "kube-system", "comma-separated `namespaces` never enrolled")
	v4 := fs.String("probe-ipv4", "", "`address` that stands for the node's probes (default 169.254.7.127)")
	v6 := fs.String("probe-ipv6", "", "`address` that stands for the node's probes (default fd16:9254:7127:1337:ffff:ffff:ffff:ffff)")
	if err := parse(fs, args); err != nil {
		return err
	}
	if *excluded != "" {
		c.ExcludeNamespaces = strings.Split(*excluded, ",")
	}
	var errs [2]error
	c.ProbeV4, errs[0] = optionalAddr("probe-ipv4", *v4)
	c.ProbeV6, errs[1] = optionalAddr("probe-ipv6", *v6)
	if err := errors.Join(errs[:]...); err != nil {
		return err
	}
	return Run(ctx, c, stdout)
}

func optionalAddr(name, value string) (netip.Addr, error) {
	if value == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(value)
	if err != nil {
		return a, fmt.Errorf("--%s: %w", name, err)
	}
	return a, nil
}

func cleanupCommand(args []string, stdout, stderr io.Writer) error {
	var c Config
	fs := newFlagSet("cleanup", stderr)
	commonFlags(fs, &c)
	if err := parse(fs, args); err != nil {
		return err
	}
	return Cleanup(c, stdout)
}

func statusCommand(args []string, stdout, stderr io.Writer) error {
	var c Config
	fs := newFlagSet("status", stderr)
	commonFlags(fs, &c)
	format := fs.String("o", "", "output `format`: a table, or json: {\"node\": how pods are captured and why, \"pods\": [one status each]}")
	if err := parse(fs, args); err != nil {
		return err
	}
	if *format != "" && *format != "json" && *format != "table" {
		return wrong(fs, "-o %s: want json or table", *format)
	}
	if _, err := os.Stat(c.StatusDir); err != nil {
		return fmt.Errorf("read status directory (has the agent run, with the same --status-dir?): %w", err)
	}
	dir, err := agent.OpenStatusDir(c.StatusDir)
	if err != nil {
		return err
	}
	node, nerr := dir.Node()
	pods, err := dir.List()
	err = errors.Join(nerr, err)
	if *format == "json" {
		if pods == nil {
			pods = []agent.Status{}
		}
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		return errors.Join(err, enc.Encode(struct {
			Node agent.NodeStatus `json:"node"`
			Pods []agent.Status   `json:"pods"`
		}{node, pods}))
	}
	printNode(stdout, node)
	return errors.Join(err, printTable(stdout, pods))
}

// printNode prints nothing for a node whose agent never ran.
func printNode(w io.Writer, n agent.NodeStatus) {
	if n.Redirector == "" {
		return
	}
	fmt.Fprintf(w, "pods are captured with %s: %s\n", n.Redirector, n.Reason)
	for _, l := range n.Limits {
		fmt.Fprintf(w, "does not hold: %s\n", l)
	}
	for _, o := range n.Obstacles {
		fmt.Fprintf(w, "in the way: %s\n", o)
	}
	for _, m := range n.Missing {
		fmt.Fprintf(w, "missing capability: %s\n", m)
	}
	fmt.Fprintln(w)
}

func printTable(w io.Writer, pods []agent.Status) error {
	if len(pods) == 0 {
		_, err := fmt.Fprintln(w, "no pod of this node is in the mesh")
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "NAMESPACE\tNAME\tREDIRECTION\tVIA\tSINCE\tREASON")
	for _, p := range pods {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", p.Namespace, p.Name, p.Redirection, cmp.Or(p.Via, "-"), p.Since.Format(time.RFC3339), p.Reason)
	}
	return tw.Flush()
}
