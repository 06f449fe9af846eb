package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/ambit-mesh/ambit/xds/app"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/crd"
)

// serveFlags are ambitd's flags before they are checked.
type serveFlags struct {
	app.Config
	sources, listen, dnsNames, ips, accounts, audiences string
	logFormat, logLevel                                 string
}

func parseServe(args []string, stderr io.Writer) (*serveFlags, error) {
	var f serveFlags
	set := flag.NewFlagSet("ambitd serve", flag.ContinueOnError)
	set.StringVar(&f.sources, "source", "", "where objects come from: dir:PATH[,PATH...], watched directories of YAML")
	set.StringVar(&f.StateDir, "state-dir", "", "directory for the CA's and the tokens' keys, root-cert.pem and last good policies")
	set.StringVar(&f.CADir, "ca-dir", "", "directory with ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem of an existing CA")
	set.StringVar(&f.listen, "listen", ":15012", "addresses of xDS and the certificate API, comma-separated")
	set.StringVar(&f.Monitoring, "monitoring", ":15014", "address of /metrics, /status and /ready; /debug and /logging there answer only this host")
	set.StringVar(&f.TrustDomain, "trust-domain", "cluster.local", "trust domain, unless the mesh configuration names one")
	set.StringVar(&f.ClusterID, "cluster-id", "Kubernetes", "name of this cluster in resource names")
	set.StringVar(&f.ClusterDomain, "cluster-domain", "cluster.local", "DNS domain of services")
	set.Func("same-node", "how workloads of one node reach each other: hbone or local; default: local where plaintext is accepted", func(v string) error {
		f.SameNode = crd.SameNode(v)
		if !slices.Contains(f.SameNode.Values(), v) {
			return errors.New("valid are hbone, local")
		}
		return nil
	})
	set.StringVar(&f.Network, "network", "", "name of the network that pods are on")
	set.StringVar(&f.SystemNamespace, "namespace", "ambit-system", "namespace that ambitd and the node proxies run in")
	set.StringVar(&f.RootNamespace, "root-namespace", "", "namespace of mesh-wide policy; default: what the mesh configuration says")
	set.StringVar(&f.dnsNames, "dns-names", "", "more DNS names for the server's certificate, comma-separated")
	set.StringVar(&f.ips, "advertise-ip", "", "more IP addresses for the server's certificate, comma-separated")
	set.StringVar(&f.accounts, "trusted-node-accounts", "", "namespace/serviceaccount that may ask for identities of pods on their node, comma-separated")
	set.StringVar(&f.audiences, "token-audiences", "istio-ca", "audiences accepted in tokens, comma-separated")
	set.DurationVar(&f.MaxConnectionAge, "max-connection-age", 0, "make proxies reconnect after this time (0: never)")
	set.StringVar(&f.logFormat, "log-format", "text", "text or json")
	set.StringVar(&f.logLevel, "log-level", "info", "level, or level,scope=level,...")
	if err := parse(set, args, stderr); err != nil {
		return nil, err
	}
	kind, paths, _ := strings.Cut(f.sources, ":")
	switch {
	case f.sources == "":
		return nil, errors.New("no source: give --source dir:PATH")
	case kind != "dir":
		return nil, fmt.Errorf("--source %q: this build reads directories only, give dir:PATH", f.sources)
	}
	f.Sources, f.Listen, f.DNSNames = list(paths), list(f.listen), list(f.dnsNames)
	f.IPs, f.NodeAccounts, f.Audiences = list(f.ips), list(f.accounts), list(f.audiences)
	return &f, boot.CheckLogging(f.logFormat, f.logLevel)
}

func serveCommand(args []string, stdout, stderr io.Writer) error {
	f, err := parseServe(args, stderr)
	if err != nil {
		return &exitError{2, err}
	}
	out := boot.NewQueue(stdout, 0)
	defer out.Close()
	log, levels := boot.NewLogger(out, f.logFormat, f.logLevel)
	reg := boot.NewRegistry("ambitd")
	if err := boot.RegisterQueue(reg, out); err != nil {
		return err
	}
	if _, err := boot.RaiseNoFile(); err != nil {
		log.Warn("few connections are possible", "error", err)
	}
	ctx, stop := boot.SignalContext(context.Background())
	defer stop()
	return app.Run(ctx, f.Config, log, levels, reg)
}

// list splits at commas and drops what is empty.
func list(s string) []string {
	var out []string
	for part := range strings.SplitSeq(s, ",") {
		if part = strings.TrimSpace(part); part != "" {
			out = append(out, part)
		}
	}
	return out
}

// parse reads flags. Asked for help it prints them; a wrong flag is one line.
func parse(set *flag.FlagSet, args []string, stderr io.Writer) error {
	set.SetOutput(io.Discard)
	err := set.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		set.SetOutput(stderr)
		set.Usage()
		return err
	case err != nil:
		return fmt.Errorf("%w (-h lists the flags)", err)
	case set.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	return nil
}
