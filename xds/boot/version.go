package boot

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
)

// Version is the release, set by the build:
//
//	-ldflags "-X github.com/ambit-mesh/ambit/xds/boot.Version=v0.1.0"
//
// It is never written at run time.
var Version = "dev"

// Build describes the running binary.
type Build struct {
	Program  string `json:"program"`
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

// BuildOf describes this binary under the given program name.
func BuildOf(program string) Build {
	b := Build{Program: program, Version: Version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	if info, ok := debug.ReadBuildInfo(); ok {
		dirty := ""
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision":
				b.Revision = s.Value
			case s.Key == "vcs.modified" && s.Value == "true":
				dirty = "-dirty"
			}
		}
		if b.Revision != "" {
			b.Revision += dirty
		}
	}
	return b
}

func (b Build) String() string {
	s := b.Program + " " + b.Version
	if b.Revision != "" {
		s += " (" + b.Revision + ")"
	}
	return s + " " + b.Go + " " + b.Platform
}

// PrintVersion is the `version` subcommand: one line of text, or JSON with
// `-o json`.
func PrintVersion(w io.Writer, program string, args []string) error {
	b := BuildOf(program)
	switch {
	case len(args) == 0:
		_, err := fmt.Fprintln(w, b)
		return err
	case len(args) == 1 && args[0] == "-o=json", len(args) == 2 && args[0] == "-o" && args[1] == "json":
		return json.NewEncoder(w).Encode(b)
	}
	return fmt.Errorf("version: unexpected arguments %q: use `%s version` or `%s version -o json`", args, program, program)
}
