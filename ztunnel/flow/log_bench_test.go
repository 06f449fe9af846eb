package flow

import (
	"io"
	"testing"

	"github.com/ambit-mesh/ambit/xds/boot"
)

// BenchmarkConnectionLine is all that a connection costs here: registered, described, ended, and its line.
func BenchmarkConnectionLine(b *testing.B) {
	log, _ := boot.NewLogger(io.Discard, "text", "info")
	table := New(Config{Logger: log})
	rec := Record{Direction: Inbound, Pod: "b", Src: src, Dst: dst, SrcID: peer, DstID: dst.Identity, Transport: HBONE, HBONEAddr: "10.0.0.2:80"}
	b.ReportAllocs()
	for b.Loop() {
		c, _ := table.Begin(b.Context(), rec)
		c.Describe()
		c.End(nil)
	}
}
