// Command ztunnel is the node proxy: it gives every enrolled pod of its node an
// identity, mutual TLS and layer 4 policy.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/ztunnel/app"
)

func main() { os.Exit(run(os.Args[1:], os.Environ(), os.Stdout, os.Stderr)) }

func run(args, environ []string, stdout, stderr io.Writer) int {
	if len(args) > 0 && args[0] == "version" {
		if err := boot.PrintVersion(stdout, "ztunnel", args[1:]); err != nil {
			fmt.Fprintln(stderr, err)
			return 2
		}
		return 0
	}
	cfg, err := app.Parse(args, environ, stderr)
	if errors.Is(err, app.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintf(stderr, "ztunnel: %v\n", err)
		return 2
	}
	queue := boot.NewQueue(stdout, 0)
	defer queue.Close()
	log, levels := boot.NewLogger(queue, cfg.LogFormat, cfg.LogLevel)
	reg := boot.NewRegistry("ztunnel")
	if err := boot.RegisterQueue(reg, queue); err != nil {
		fmt.Fprintf(stderr, "ztunnel: %v\n", err)
		return 1
	}
	ctx, stop := boot.SignalContext(context.Background())
	defer stop()
	if err := app.Run(ctx, cfg, log, levels, reg); err != nil {
		log.Error("stopped", "error", err.Error())
		return 1
	}
	return 0
}
