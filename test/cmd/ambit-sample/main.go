// Command ambit-sample is the lab's applications in one program: an echo server
// and client for every kind of traffic, and the four services of bookinfo under
// the names and paths that guides use.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/ambit-mesh/ambit/xds/boot"
)

const usage = `Usage: ambit-sample ROLE [flags]

  echo          HTTP (8080 or $PORT), gRPC 7070, TCP 9000, server-first TCP 9001, UDP 9002
  tcp-echo      PORTS PREFIX: TCP echo as istio's sample
  call          URL: client for http://, grpc://, tcp:// (--greeting), udp://
  lookup        NAME: addresses, from the pod's DNS
  load          HOST:PORT: closed loop of requests to a TCP echo server; rate and latency as JSON
  soak          HOST:PORT...: random bytes to TCP echo servers, every one compared; fails if one is wrong
  hold          HOST:PORT: many idle connections to a TCP echo server
  attack        handshakes|stalled|connects HOST:PORT: a neighbour that others must not notice
  sniff         INTERFACE MARKER [DURATION]: look at packets until then or a signal, and say what was seen
  pause         wait for a signal
  productpage, details, ratings, reviews --version v1|v2|v3 [--addr :9080]
  version
`

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	roles := map[string]func(context.Context, []string, io.Writer) error{
		"echo": echo, "tcp-echo": tcpEcho, "call": call, "sniff": sniff,
		"lookup": lookup, "load": load, "hold": hold, "soak": soak, "attack": attack,
		"pause":       func(ctx context.Context, _ []string, _ io.Writer) error { <-ctx.Done(); return nil },
		"productpage": bookinfo(productpage), "details": bookinfo(details), "ratings": bookinfo(ratings), "reviews": bookinfo(reviews),
		"version": func(_ context.Context, args []string, w io.Writer) error {
			return boot.PrintVersion(w, "ambit-sample", args)
		},
	}
	role, ok := roles[args[0]]
	if !ok {
		fmt.Fprintf(stderr, "ambit-sample: there is no role %q\n%s", args[0], usage)
		return 2
	}
	if err := role(ctx, args[1:], stdout); err != nil && ctx.Err() == nil {
		fmt.Fprintln(stderr, "ambit-sample:", err)
		return 1
	}
	return 0
}
