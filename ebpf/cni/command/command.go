// Package command is what a user or a container runtime calls ambit-cni with: the
// operations of the CNI specification, by CNI_COMMAND, and the installer, by name.
package command

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/ambit-mesh/ambit/ebpf/cni"
	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
	"github.com/ambit-mesh/ambit/ebpf/cni/install"
	"github.com/ambit-mesh/ambit/xds/boot"
)

const usage = `ambit-cni lets pods of the mesh start when their traffic is redirected.

  ambit-cni                                  the CNI plugin, as container runtimes call it (CNI_COMMAND)
  ambit-cni install [--watch]                copy the program and chain it to the node's network configuration
  ambit-cni uninstall                        undo that (before the agent is removed)
  ambit-cni version

ambit-cni COMMAND --help lists a command's flags.
`

var errUsage = errors.New("wrong usage")

// Main runs one command and returns the exit status: 2 for wrong usage.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		return plugin(ctx, stdout, stderr)
	}
	var err error
	switch name, rest := args[0], args[1:]; name {
	case "install":
		err = installCommand(ctx, rest, stderr)
	case "uninstall":
		err = uninstallCommand(rest, stderr)
	case "version":
		err = boot.PrintVersion(stdout, cni.Type, rest)
	case "help", "--help", "-h":
		_, err = io.WriteString(stdout, usage)
	default:
		fmt.Fprintf(stderr, "%s: no command %q\n\n%s", cni.Type, name, usage)
		return 2
	}
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		return 2 // the flag package has said it
	default:
		fmt.Fprintf(stderr, "%s %s: %v\n", cni.Type, args[0], err)
		return 1
	}
}

// plugin is one operation. skel reads the process's own environment and input.
func plugin(ctx context.Context, stdout, stderr io.Writer) int {
	p := cni.Plugin{Stdout: stdout}
	about := "CNI plugin " + cni.Type + " " + boot.Version + "; ambit-cni help lists its commands"
	if err := skel.PluginMainFuncsWithError(p.Funcs(ctx), cni.Versions(), about); err != nil {
		// The specification wants errors on the standard output.
		if perr := err.Print(); perr != nil {
			fmt.Fprintf(stderr, "%s: write error %v: %v\n", cni.Type, err, perr)
		}
		return 1
	}
	return 0
}

func directories(fs *flag.FlagSet, c *install.Config) {
	fs.StringVar(&c.BinDir, "cni-bin-dir", "/opt/cni/bin", "`directory` of the node's CNI plugins")
	fs.StringVar(&c.ConfDir, "cni-conf-dir", "/etc/cni/net.d", "`directory` of the node's network configurations")
}

func parse(name string, args []string, stderr io.Writer, define func(*flag.FlagSet)) error {
	fs := flag.NewFlagSet(cni.Type+" "+name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	define(fs)
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errUsage
	}
	if fs.NArg() > 0 {
		fmt.Fprintf(stderr, "%s takes no argument %q\n", fs.Name(), fs.Arg(0))
		return errUsage
	}
	return nil
}

func installCommand(ctx context.Context, args []string, stderr io.Writer) error {
	c := install.Config{Logger: slog.New(slog.NewTextHandler(stderr, nil))}
	var watch bool
	var excluded string
	err := parse("install", args, stderr, func(fs *flag.FlagSet) {
		directories(fs, &c)
		fs.BoolVar(&watch, "watch", false, "go on: wait for a configuration to chain to, and chain again when somebody rewrites it")
		fs.StringVar(&c.Entry.Socket, "cni-socket", attach.DefaultSocket, "the agent's `socket`, as the runtime sees it")
		fs.StringVar(&c.Entry.StateDir, "state-dir", attach.DefaultStateDir, "the agent's `directory` of state, as the runtime sees it")
		fs.IntVar(&c.Entry.TimeoutSeconds, "timeout-seconds", 30, "how long a pod's start waits for its redirection before it is tried again")
		fs.StringVar(&excluded, "exclude-namespaces", strings.Join(cni.DefaultExcluded(), ","), "comma-separated `namespaces` whose pods never wait, the agent's and ztunnel's among them")
		fs.BoolVar(&c.Entry.StrictStatus, "strict-status", false, "have the whole node take no pods while the agent is away, where runtimes ask for STATUS (CNI 1.1)")
	})
	if err != nil {
		return err
	}
	c.Entry.ExcludeNamespaces = slices.DeleteFunc(strings.Split(excluded, ","), func(s string) bool { return s == "" })
	if c.Program, err = os.Executable(); err != nil {
		return fmt.Errorf("find the plugin's program: %w", err)
	}
	i, err := install.New(c)
	if err != nil {
		return err
	}
	if watch {
		return i.Watch(ctx)
	}
	return i.Install()
}

func uninstallCommand(args []string, stderr io.Writer) error {
	c := install.Config{Logger: slog.New(slog.NewTextHandler(stderr, nil))}
	if err := parse("uninstall", args, stderr, func(fs *flag.FlagSet) { directories(fs, &c) }); err != nil {
		return err
	}
	i, err := install.New(c)
	if err != nil {
		return err
	}
	return i.Uninstall()
}
