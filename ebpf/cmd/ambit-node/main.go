// Command ambit-node is the node agent: it finds the node's enrolled pods,
// redirects their traffic and hands their network namespaces to ztunnel.
package main

import (
	"context"
	"os"

	"github.com/ambit-mesh/ambit/ebpf/app"
	"github.com/ambit-mesh/ambit/xds/boot"
)

func main() {
	ctx, stop := boot.SignalContext(context.Background())
	defer stop()
	os.Exit(app.Main(ctx, os.Args[1:], os.Stdout, os.Stderr))
}
