package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"
)

// lookup asks the pod's DNS, as programs do: search domains, both families.
func lookup(ctx context.Context, args []string, out io.Writer) error {
	if len(args) != 1 {
		return errors.New("lookup wants one name")
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	// Go's own resolver, so that the answer does not depend on the machine's libc.
	addrs, err := (&net.Resolver{PreferGo: true}).LookupHost(ctx, args[0])
	if err != nil {
		return err
	}
	slices.Sort(addrs)
	for _, a := range addrs {
		fmt.Fprintln(out, a)
	}
	return nil
}
