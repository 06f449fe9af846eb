package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/ambit-mesh/ambit/xds/ca"
)

const caUsage = `Usage:
  ambitd ca status     --state-dir DIR                    certificates, phase of a rotation, what is next
  ambitd ca rotate     --state-dir DIR                    add another root; both are trusted
  ambitd ca promote    --state-dir DIR [--force]          let the added root sign
  ambitd ca retire     --state-dir DIR [--force]          end the trust in the previous root
  ambitd ca abandon    --state-dir DIR                    take an added root back
  ambitd ca revoke     --state-dir DIR --cert FILE | --serial N   put a certificate on the revocation list
  ambitd ca restore    --state-dir DIR --key FILE         put a lost key back from a copy
  ambitd ca revoke-key --state-dir DIR --force            the key leaked: another root at once, nothing of the old one counts

-o json prints the same for programs. A running ambitd follows within seconds. Exit status: 0 done and nothing to warn
of, 1 refused, failed or (status) something needs attention, 2 wrong flags.
`

// caFlags are the flags of the ca commands.
type caFlags struct {
	ca.Config
	force             bool
	cert, serial, key string
	format            string
}

// caSteps are the commands and the flags that each needs.
var caSteps = map[string]struct {
	flags []string
	do    func(*ca.Keeper, *caFlags) (*ca.Report, error)
}{
	"status":  {nil, func(k *ca.Keeper, _ *caFlags) (*ca.Report, error) { return k.Status(), nil }},
	"rotate":  {nil, func(k *ca.Keeper, _ *caFlags) (*ca.Report, error) { return k.Rotate() }},
	"promote": {[]string{"force"}, func(k *ca.Keeper, f *caFlags) (*ca.Report, error) { return k.Promote(f.force) }},
	"retire":  {[]string{"force"}, func(k *ca.Keeper, f *caFlags) (*ca.Report, error) { return k.Retire(f.force) }},
	"abandon": {nil, func(k *ca.Keeper, _ *caFlags) (*ca.Report, error) { return k.Abandon() }},
	"revoke":  {[]string{"cert", "serial"}, revoke},
	"restore": {[]string{"key"}, func(k *ca.Keeper, f *caFlags) (*ca.Report, error) {
		if f.key == "" {
			return nil, &exitError{2, errors.New("ca restore: give --key, the file with the saved key")}
		}
		return k.Restore(f.key)
	}},
	"revoke-key": {[]string{"force"}, func(k *ca.Keeper, f *caFlags) (*ca.Report, error) {
		if !f.force {
			return nil, errors.New("ca revoke-key: every connection of the mesh is cut and calls fail until both proxies have another certificate: say --force if the key has leaked, otherwise `ambitd ca rotate`")
		}
		return k.RevokeKey()
	}},
}

func revoke(k *ca.Keeper, f *caFlags) (*ca.Report, error) {
	switch {
	case (f.cert == "") == (f.serial == ""):
		return nil, &exitError{2, errors.New("ca revoke: give --cert or --serial")}
	case f.cert != "":
		return k.RevokeCertificate(f.cert)
	}
	serial, err := ca.ParseSerial(f.serial)
	if err != nil {
		return nil, &exitError{2, fmt.Errorf("ca revoke: %w", err)}
	}
	return k.Revoke(serial)
}

// caCommand changes the CA of a state directory, whether ambitd runs or not.
func caCommand(args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 || args[0] == "-h" || args[0] == "--help" {
		fmt.Fprint(stdout, caUsage)
		if len(args) == 0 {
			return &exitError{code: 2}
		}
		return nil
	}
	step, ok := caSteps[args[0]]
	if !ok {
		return &exitError{2, fmt.Errorf("ca: unknown command %q (`ambitd ca -h` lists them)", args[0])}
	}
	f, err := parseCA(args[0], step.flags, args[1:], stderr)
	if err != nil {
		return err
	}
	k, err := ca.Keep(f.Config)
	if err != nil {
		return err
	}
	defer k.Close()
	r, err := step.do(k, f)
	if err != nil {
		return err
	}
	if err := printCA(stdout, r, f.format, time.Now()); err != nil {
		return err
	}
	if args[0] == "status" && len(r.Warnings) > 0 {
		return &exitError{code: 1}
	}
	return nil
}

func parseCA(name string, flags, args []string, stderr io.Writer) (*caFlags, error) {
	var f caFlags
	set := flag.NewFlagSet("ambitd ca "+name, flag.ContinueOnError)
	set.StringVar(&f.StateDir, "state-dir", "", "ambitd's state directory")
	set.StringVar(&f.PluggedDir, "ca-dir", "", "ambitd's --ca-dir, if it has one")
	set.StringVar(&f.TrustDomain, "trust-domain", "cluster.local", "trust domain, the organization in another root's name")
	set.StringVar(&f.format, "o", "text", "text or json")
	for _, name := range flags {
		switch name {
		case "force":
			set.BoolVar(&f.force, "force", false, "do it though some proxies may not be ready")
		case "cert":
			set.StringVar(&f.cert, "cert", "", "PEM file of the certificate")
		case "serial":
			set.StringVar(&f.serial, "serial", "", "its serial number, decimal or 0x and hexadecimal")
		case "key":
			set.StringVar(&f.key, "key", "", "PEM file of the private key")
		}
	}
	if err := parse(set, args, stderr); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, &exitError{2, fmt.Errorf("ca %s: %w", name, err)}
	}
	if f.StateDir == "" {
		return nil, &exitError{2, fmt.Errorf("ca %s: give --state-dir, the directory of the ambitd", name)}
	}
	if f.format != "text" && f.format != "json" {
		return nil, &exitError{2, fmt.Errorf("ca %s: -o %q: one of text, json", name, f.format)}
	}
	return &f, nil
}

func printCA(w io.Writer, r *ca.Report, format string, now time.Time) error {
	if format == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	if r.Did != "" {
		fmt.Fprintf(t, "done\t%s\n", r.Did)
	}
	fmt.Fprintf(t, "phase\t%s\n", r.Phase)
	for _, c := range r.Certs {
		fmt.Fprintf(t, "%s\t%s  %s  until %s\n", c.Role, c.Fingerprint, c.Subject, c.NotAfter.Format(time.RFC3339))
	}
	if r.Revoked > 0 {
		fmt.Fprintf(t, "revoked\t%d\n", r.Revoked)
	}
	for _, text := range r.Warnings {
		fmt.Fprintf(t, "warning\t%s\n", text)
	}
	if r.Next != "" {
		when := ""
		if r.NextAt.After(now) {
			when = fmt.Sprintf("; from %s (in %s)", r.NextAt.UTC().Format(time.RFC3339), r.NextAt.Sub(now).Round(time.Minute))
		} else if !r.NextAt.IsZero() {
			when = "; now"
		}
		fmt.Fprintf(t, "next\t%s%s\n", r.Next, when)
	}
	return t.Flush()
}
