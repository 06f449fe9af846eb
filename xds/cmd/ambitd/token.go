package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/ambit-mesh/ambit/xds/ca"
)

// tokenCommand mints a token. It needs only the state directory, so it works
// before and without a running ambitd.
func tokenCommand(args []string, stdout, stderr io.Writer) error {
	var c ca.Caller
	set := flag.NewFlagSet("ambitd token", flag.ContinueOnError)
	stateDir := set.String("state-dir", "", "ambitd's state directory")
	set.StringVar(&c.Node, "node", "", "node that the token is bound to")
	set.StringVar(&c.Namespace, "namespace", "ambit-system", "namespace of the caller")
	set.StringVar(&c.ServiceAccount, "service-account", "ztunnel", "service account of the caller")
	set.StringVar(&c.PodName, "pod", "", "pod that the token is bound to")
	set.StringVar(&c.PodUID, "uid", "", "uid of that pod")
	ttl := set.Duration("ttl", 24*time.Hour, "life of the token")
	audience := set.String("audience", ca.DefaultAudience, "audience of the token")
	if err := parse(set, args, stderr); err != nil {
		return &exitError{2, err}
	}
	switch {
	case *stateDir == "":
		return &exitError{2, errors.New("token: give --state-dir, the directory of the ambitd that will check the token")}
	case (c.PodName == "") != (c.PodUID == ""):
		return &exitError{2, errors.New("token: --pod and --uid go together")}
	}
	if _, err := os.Stat(*stateDir); errors.Is(err, fs.ErrNotExist) {
		// Not refused: a token may be wanted before the first start.
		fmt.Fprintf(stderr, "ambitd: token: %s is made now, with a key of its own: only an ambitd that runs with this --state-dir accepts the token\n", *stateDir)
	}
	tokens, err := ca.OpenTokens(*stateDir, nil, nil)
	if err != nil {
		return err
	}
	token, err := tokens.Mint(c, *audience, *ttl)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(stdout, token); err != nil {
		return fmt.Errorf("print token: %w", err)
	}
	return nil
}
