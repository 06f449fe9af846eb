// Command ambit-perf measures a mesh: declared loads between two pods, without a
// mesh, through plain relays, through Ambit and through any node proxy that is
// given as a program, all in one network on this machine and in turn.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ambit-mesh/ambit/perf/inspect"
	"github.com/ambit-mesh/ambit/perf/load"
	"github.com/ambit-mesh/ambit/perf/peer"
	"github.com/ambit-mesh/ambit/perf/report"
	"github.com/ambit-mesh/ambit/perf/scenario"
	"github.com/ambit-mesh/ambit/perf/topo"
	"github.com/ambit-mesh/ambit/xds/boot"
)

const usage = `Usage:
  ambit-perf run [flags] [SCENARIO...]   measure; SCENARIO is a regular expression, default: the core set
  ambit-perf list [SCENARIO...]          scenarios and modes
  ambit-perf show FILE...                print a report that was kept as JSON; --markdown: short tables for a document,
                                         --html FILE: the page. Several files of one build become one report
  ambit-perf compare A.json B.json       what differs; --all: every figure; -o json
  ambit-perf sizing FILE...              what a node proxy costs, and the requests and limits that follow for a node
  ambit-perf version [-o json]

ambit-perf run -h lists its flags. It wants root, or a machine where users may make namespaces,
and the programs that make build puts beside it.
Exit status: 0 ok; 1 failed, or some runs did; 2 wrong flags; 3 compare found something worse beyond noise.
`

func main() {
	ctx, stop := untilSignal(context.Background())
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// errUsage is a mistake in the command line.
var errUsage = errors.New("wrong command line")

// errWorse is what compare was asked to find.
var errWorse = errors.New("worse")

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return 2
	}
	verbs := map[string]func(context.Context, []string, io.Writer, io.Writer) error{
		"run": runCommand, "list": listCommand, "show": showCommand, "compare": compareCommand, "sizing": sizingCommand,
		"version": func(_ context.Context, args []string, out, _ io.Writer) error {
			if err := boot.PrintVersion(out, "ambit-perf", args); err != nil {
				return fmt.Errorf("%w: %w", errUsage, err)
			}
			return nil
		},
		topo.Client: clientCommand, topo.Serve: serveCommand, topo.Hop: hopCommand, topo.Proxy: proxyCommand, topo.Asker: askerCommand, topo.Churn: churnCommand, topo.Member: memberCommand, topo.Hellos: hellosCommand,
	}
	if slices.Contains([]string{"-h", "--help", "help"}, args[0]) {
		if len(args) == 1 || verbs[args[1]] == nil {
			fmt.Fprint(stdout, usage)
			return 0
		}
		args = []string{args[1], "-h"}
	}
	f, ok := verbs[args[0]]
	if !ok {
		fmt.Fprintf(stderr, "ambit-perf: unknown command %q\n%s", args[0], usage)
		return 2
	}
	err := f(ctx, args[1:], stdout, stderr)
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		fmt.Fprintf(stderr, "ambit-perf %s: %v\n", args[0], err)
		return 2
	case errors.Is(err, errWorse): // and was printed
		return 3
	}
	fmt.Fprintf(stderr, "ambit-perf: %v\n", err)
	return 1
}

func listCommand(_ context.Context, args []string, stdout, stderr io.Writer) error {
	fs := flag.NewFlagSet("list", flag.ContinueOnError)
	if err := parse(fs, &args, stderr); err != nil {
		return err
	}
	list, err := scenario.Select(scenario.Catalog(), scenario.All, args)
	if err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	t := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "SCENARIO\tSET\tWHAT")
	for _, s := range list {
		fmt.Fprintf(t, "%s\t%s\t%s\n", s.Name, []string{"quick", "core", "all"}[s.Set], s.Title)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "\nModes: %s, and peers (--peer NAME[:KIND]=PROGRAM)\n", strings.Join(topo.BuiltIn, ", "))
	return err
}

func showCommand(_ context.Context, args []string, stdout, stderr io.Writer) error {
	fs := flag.NewFlagSet("show", flag.ContinueOnError)
	html := fs.String("html", "", "write the page to this `file` instead")
	kept := fs.String("json", "", "write the report to this `file` instead")
	markdown := fs.Bool("markdown", false, "short tables for a document, without paths of this machine")
	if err := parse(fs, &args, stderr); err != nil {
		return err
	}
	r, err := readReports(args)
	if err != nil {
		return err
	}
	var errs []error
	if *html != "" {
		errs = append(errs, writeFile(*html, r.HTML))
	}
	if *kept != "" {
		errs = append(errs, writeFile(*kept, r.Encode))
	}
	switch {
	case *markdown:
		errs = append(errs, r.Markdown(stdout))
	case *html == "" && *kept == "":
		errs = append(errs, r.Text(stdout))
	}
	return errors.Join(errs...)
}

func compareCommand(_ context.Context, args []string, stdout, stderr io.Writer) error {
	fs := flag.NewFlagSet("compare", flag.ContinueOnError)
	all := fs.Bool("all", false, "show every figure, not only those that count")
	output := fs.String("o", "table", "`table|json`")
	if err := parse(fs, &args, stderr); err != nil {
		return err
	}
	if len(args) != 2 {
		return fmt.Errorf("%w: compare wants two files", errUsage)
	}
	a, err := readReport(args[0])
	if err != nil {
		return err
	}
	b, err := readReport(args[1])
	if err != nil {
		return err
	}
	c, err := report.Compare(a, b)
	if err != nil {
		return err
	}
	if err := print(stdout, *output, c, func(w io.Writer) error { return c.Text(w, *all) }); err != nil {
		return err
	}
	if len(c.Worse) > 0 {
		return errWorse
	}
	return nil
}

func sizingCommand(_ context.Context, args []string, stdout, stderr io.Writer) error {
	fs := flag.NewFlagSet("sizing", flag.ContinueOnError)
	var n report.Node
	def := report.ExampleNode
	fs.IntVar(&n.Pods, "pods", def.Pods, "enrolled `pods` of the node")
	fs.IntVar(&n.Connections, "connections", def.Connections, "open `connections`")
	fs.IntVar(&n.Connects, "connects", def.Connects, "new `connections` per second")
	fs.Float64Var(&n.GB, "gb", def.GB, "`GB` per second")
	fs.IntVar(&n.Requests, "requests", def.Requests, "`requests` per second on open connections")
	fs.IntVar(&n.Workloads, "workloads", def.Workloads, "`workloads` of the whole mesh")
	mode := fs.String("mode", topo.Ambit, "`mode` of the report")
	output := fs.String("o", "table", "`table|json`")
	if err := parse(fs, &args, stderr); err != nil {
		return err
	}
	if err := n.Validate(); err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	r, err := readReports(args)
	if err != nil {
		return err
	}
	if modes := r.Modes(); !slices.Contains(modes, *mode) {
		return fmt.Errorf("%w: --mode %s is not in the report: it has %s", errUsage, *mode, strings.Join(modes, ", "))
	}
	s := r.SizingOf(*mode, n)
	return print(stdout, *output, s, s.Text)
}

// print writes a form that was asked for.
func print(w io.Writer, form string, v any, text func(io.Writer) error) error {
	switch form {
	case "table":
		return text(w)
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", " ")
		return enc.Encode(v)
	}
	return fmt.Errorf("%w: -o %s: want table or json", errUsage, form)
}

// readReports makes one of several.
func readReports(paths []string) (*report.Report, error) {
	if len(paths) == 0 {
		return nil, fmt.Errorf("%w: want a file", errUsage)
	}
	var all []*report.Report
	for _, path := range paths {
		r, err := readReport(path)
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return report.Merge(all...)
}

func readReport(path string) (*report.Report, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := report.Decode(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// parse takes flags before, between and after words. What is wrong is told by the
// caller, in a line; all flags are told to those who ask.
func parse(fs *flag.FlagSet, args *[]string, asked io.Writer) error {
	fs.SetOutput(io.Discard)
	var words []string
	for rest := *args; ; {
		if err := fs.Parse(rest); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				fmt.Fprintf(asked, "Flags of ambit-perf %s:\n", fs.Name())
				fs.SetOutput(asked)
				fs.PrintDefaults()
				return err
			}
			return fmt.Errorf("%w: %w; ambit-perf %s -h lists the flags", errUsage, err, fs.Name())
		}
		if rest = fs.Args(); len(rest) == 0 {
			*args = words
			return nil
		}
		words, rest = append(words, rest[0]), rest[1:]
	}
}

// given are the flags that were set.
func given(fs *flag.FlagSet) map[string]bool {
	out := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { out[f.Name] = true })
	return out
}

// The verbs of the runs inside the lab.

func clientCommand(ctx context.Context, args []string, stdout, _ io.Writer) error {
	var s load.Spec
	if len(args) != 1 || json.Unmarshal([]byte(args[0]), &s) != nil {
		return fmt.Errorf("%w: this verb is used by ambit-perf itself", errUsage)
	}
	load.Tune()
	r, err := load.Run(ctx, s)
	if err != nil {
		return err
	}
	return json.NewEncoder(stdout).Encode(r)
}

func serveCommand(ctx context.Context, _ []string, _, _ io.Writer) error {
	load.Tune()
	return load.Serve(ctx, fmt.Sprintf(":%d", load.Port))
}

func hopCommand(ctx context.Context, args []string, stdout, _ io.Writer) error {
	var h load.Hop
	if len(args) != 1 || json.Unmarshal([]byte(args[0]), &h) != nil {
		return fmt.Errorf("%w: this verb is used by ambit-perf itself", errUsage)
	}
	load.Tune()
	return h.Run(ctx, stdout)
}

func proxyCommand(ctx context.Context, args []string, stdout, _ io.Writer) error {
	var h peer.Hop
	if len(args) != 1 || json.Unmarshal([]byte(args[0]), &h) != nil {
		return fmt.Errorf("%w: this verb is used by ambit-perf itself", errUsage)
	}
	load.Tune()
	return h.Run(ctx, stdout)
}

func askerCommand(ctx context.Context, _ []string, stdout, _ io.Writer) error {
	return inspect.Serve(ctx, os.Stdin, stdout)
}

func churnCommand(ctx context.Context, args []string, stdout, _ io.Writer) error {
	var c load.Churn
	if len(args) != 1 || json.Unmarshal([]byte(args[0]), &c) != nil {
		return fmt.Errorf("%w: this verb is used by ambit-perf itself", errUsage)
	}
	return c.Run(ctx, stdout)
}

func memberCommand(ctx context.Context, args []string, stdout, _ io.Writer) error {
	if len(args) != 2 {
		return fmt.Errorf("%w: this verb is used by ambit-perf itself", errUsage)
	}
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	return topo.EnrolAs(ctx, pid, args[1], stdout)
}

func hellosCommand(ctx context.Context, _ []string, stdout, _ io.Writer) error {
	return load.Hellos(ctx, stdout)
}

func writeFile(path string, write func(io.Writer) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Close())
}

// replaceFile writes a file that is the one before, or the one after, whenever this
// process is killed. What is no regular file stays as it is.
func replaceFile(path string, write func(io.Writer) error) error {
	if st, err := os.Stat(path); err == nil && !st.Mode().IsRegular() {
		return nil
	}
	next := path + ".next"
	if err := writeFile(next, write); err != nil {
		return errors.Join(err, os.Remove(next))
	}
	return os.Rename(next, path)
}

// seconds is for people.
func seconds(d time.Duration) string {
	if d >= 2*time.Minute {
		return fmt.Sprintf("%.0f min", d.Minutes())
	}
	return fmt.Sprintf("%.0f s", d.Seconds())
}
