package main

import (
	"io"

	"github.com/ambit-mesh/ambit/xds/boot"
)

// exitError ends the program with a status other than 1; err may be nil when
// everything is said.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func versionCommand(args []string, stdout, _ io.Writer) error {
	return boot.PrintVersion(stdout, "ambitd", args)
}
