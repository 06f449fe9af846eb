// Command ambitd is the control plane: it reads Kubernetes and Istio objects,
// serves delta xDS to proxies and signs their certificates.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
)

const usage = `Usage:
  ambitd [serve] --source dir:PATH[,PATH] --state-dir DIR [flags]   run the control plane
  ambitd token --state-dir DIR --node N --pod P --uid U [flags]     print a token for a node proxy
  ambitd ca COMMAND --state-dir DIR [flags]                         rotate, revoke, restore: ambitd ca -h
  ambitd status [--addr URL] [-o json]                              ask a running ambitd how it is
  ambitd version [-o json]

` + "`ambitd COMMAND -h` lists a command's flags. Exit status: 0 ok, 1 failed (status: problems\nexist), 2 wrong flags (status: not reached).\n"

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	command := "serve"
	if len(args) > 0 && args[0] != "" && args[0][0] != '-' {
		command, args = args[0], args[1:]
	} else if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return 2
	} else if args[0] == "-h" || args[0] == "--help" {
		fmt.Fprint(stdout, usage)
		return 0
	}
	commands := map[string]func([]string, io.Writer, io.Writer) error{
		"serve": serveCommand, "token": tokenCommand, "ca": caCommand, "status": statusCommand, "version": versionCommand,
	}
	f, ok := commands[command]
	if !ok {
		fmt.Fprintf(stderr, "ambitd: unknown command %q\n%s", command, usage)
		return 2
	}
	err := f(args, stdout, stderr)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	code := 1
	if e, ok := errors.AsType[*exitError](err); ok {
		if code = e.code; e.err == nil {
			return code
		}
	}
	fmt.Fprintf(stderr, "ambitd: %v\n", err)
	return code
}
