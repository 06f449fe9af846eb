// Command ambit-cni is the chained CNI plugin that lets pods of the mesh start when
// they are redirected, and its own installer.
package main

import (
	"context"
	"os"

	"github.com/ambit-mesh/ambit/ebpf/cni/command"
	"github.com/ambit-mesh/ambit/xds/boot"
)

func main() {
	ctx, stop := boot.SignalContext(context.Background())
	defer stop()
	os.Exit(command.Main(ctx, os.Args[1:], os.Stdout, os.Stderr))
}
