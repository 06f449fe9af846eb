package app

import (
	"fmt"
	"io"
	"text/tabwriter"
)

// help lists every variable with its flag and its default. It shows defaults
// only: what is set might be secret.
func (c *Config) help(out io.Writer) {
	fmt.Fprint(out, `ztunnel gives the pods of a node, or one workload, identity, mTLS and policy.

usage: ztunnel [proxy] [flags] | help | version

Each flag is an environment variable too; flags win. Further variables:
XDS_HEADER_*, CA_HEADER_* (headers of calls), ISTIO_META_*, ISTIO_METAJSON_*
(metadata of this proxy for the control plane).

`)
	d := Defaults()
	d.XDSAddress = c.XDSAddress // depends on whether this is a cluster
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "FLAG\tVARIABLE\tDEFAULT\tMEANING")
	for _, s := range d.settings() {
		def := s.value.String()
		if def == "" {
			def = "-"
		}
		fmt.Fprintf(w, "--%s\t%s\t%s\t%s\n", flagName(s.env), s.env, def, s.help)
	}
	_ = w.Flush() // nobody reads it, then
}
