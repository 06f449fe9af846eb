package app

import (
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/test/golden"
	"github.com/ambit-mesh/ambit/xds/boot"
)

// Dashboards and alerts depend on these names.
func TestExportedMetrics(t *testing.T) {
	golden.Run(t, "testdata/metrics.txtar", func(t *testing.T, ar *golden.Archive) {
		dir := t.TempDir()
		log, _ := boot.NewLogger(io.Discard, "text", "info")
		p, err := assemble(Config{Source: "dir:" + dir, Node: "n1", ZDSPath: filepath.Join(dir, "zds.sock"), CNISocket: filepath.Join(dir, "cni.sock"),
			StatusDir: filepath.Join(dir, "status"), Redirect: "nftables"}, log)
		if err != nil {
			t.Fatal(err)
		}
		defer p.close()
		var ours []string // without the language's and the process's own
		for line := range strings.Lines(golden.Metrics(p.registry)) {
			if strings.HasPrefix(line, "ambit_node_") {
				ours = append(ours, line)
			}
		}
		ar.Want("metrics", strings.Join(ours, ""))
	})
}
