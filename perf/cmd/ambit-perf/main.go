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
  ambit-perf list                        scenarios and modes
  ambit-perf show FILE                   print a report that was kept as JSON; --html FILE makes the page of it
  ambit-perf compare A.json B.json       what differs
  ambit-perf version [-o json]

ambit-perf run -h lists its flags. It wants root, or a machine where users may make namespaces,
and the programs that make build puts beside it. Exit status: 0 ok, 1 failed, 2 wrong flags.
`

func main() {
	ctx, stop := boot.SignalContext(context.Background())
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// errUsage is a mistake in the command line.
var errUsage = errors.New("wrong command line")

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return 2
	}
	verbs := map[string]func(context.Context, []string, io.Writer, io.Writer) error{
		"run": runCommand, "list": listCommand, "show": showCommand, "compare": compareCommand,
		"version": func(_ context.Context, args []string, out, _ io.Writer) error {
			return boot.PrintVersion(out, "ambit-perf", args)
		},
		topo.Client: clientCommand, topo.Serve: serveCommand, topo.Hop: hopCommand, topo.Proxy: proxyCommand, topo.Asker: askerCommand, topo.Churn: churnCommand, topo.Member: memberCommand, topo.Hellos: hellosCommand,
	}
	if slices.Contains([]string{"-h", "--help", "help"}, args[0]) {
		fmt.Fprint(stdout, usage)
		return 0
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
	}
	fmt.Fprintf(stderr, "ambit-perf: %v\n", err)
	return 1
}

func listCommand(_ context.Context, _ []string, stdout, _ io.Writer) error {
	t := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "SCENARIO\tSET\tWHAT")
	for _, s := range scenario.Catalog() {
		fmt.Fprintf(t, "%s\t%s\t%s\n", s.Name, []string{"quick", "core", "all"}[s.Set], s.Title)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(stdout, "\nModes: %s, and peers (--peer NAME[:KIND]=PROGRAM)\n", strings.Join(topo.BuiltIn, ", "))
	return err
}

func showCommand(_ context.Context, args []string, stdout, stderr io.Writer) error {
	fs := flag.NewFlagSet("show", flag.ContinueOnError)
	fs.SetOutput(stderr)
	html := fs.String("html", "", "write the page to this `file` instead")
	if err := parse(fs, &args); err != nil {
		return err
	}
	if len(args) != 1 {
		return fmt.Errorf("%w: show wants one file", errUsage)
	}
	r, err := readReport(args[0])
	if err != nil {
		return err
	}
	if *html != "" {
		return writeFile(*html, r.HTML)
	}
	return r.Text(stdout)
}

func compareCommand(_ context.Context, args []string, stdout, _ io.Writer) error {
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
	return report.Compare(stdout, a, b)
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

// parse takes flags before, between and after words.
func parse(fs *flag.FlagSet, args *[]string) error {
	var words []string
	for rest := *args; ; {
		if err := fs.Parse(rest); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return err
			}
			return fmt.Errorf("%w: %w", errUsage, err)
		}
		if rest = fs.Args(); len(rest) == 0 {
			*args = words
			return nil
		}
		words, rest = append(words, rest[0]), rest[1:]
	}
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

// seconds is for people.
func seconds(d time.Duration) string { return fmt.Sprintf("%.0f s", d.Seconds()) }
