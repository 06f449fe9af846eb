// Command ambit-test runs `go test` so that root and ordinary users get the same
// tests: each test binary gets network and mount namespaces of its own (and,
// where the caller lacks the capability, a user namespace around them), so tests
// neither need root nor touch the machine's network. It prints one line per
// package and, at the end, each skipped test with its reason.
//
// With AMBIT_TEST_REQUIRE set, a skipped test is a failure: CI sets it. One exception:
// where the kernel takes no eBPF programs at all, which one probe in the tests'
// own surroundings decides, tests that skip for that are counted and told of.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/ambit-mesh/ambit/xds/boot"
)

func main() {
	// Debian keeps nft and others out of an ordinary user's PATH.
	_ = os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin") // a valid name always works
	// A race-detecting program lingers for a second at its end; ours start many.
	_ = os.Setenv("GORACE", strings.TrimSpace(os.Getenv("GORACE")+" atexit_sleep_ms=0"))
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	if len(args) > 1 && args[0] == "exec" {
		return isolate(args[1:])
	}
	if len(args) == 1 && args[0] == probeVerb {
		return probe(os.Stdout)
	}
	if len(args) > 0 && args[0] == "version" {
		if err := boot.PrintVersion(os.Stdout, "ambit-test", args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "ambit-test:", err)
			return 2
		}
		return 0
	}
	flags := flag.NewFlagSet("ambit-test", flag.ContinueOnError)
	fuzz := flags.String("fuzz", "", "run every fuzz target for this `duration` instead of the tests")
	filter := flags.String("run", "", "only tests that match this `regexp`")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	packages := flags.Args()
	if len(packages) == 0 {
		packages = []string{"./..."}
	}
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, "ambit-test:", err)
		return 2
	}
	if *fuzz != "" {
		return fuzzAll(packages, *fuzz)
	}
	opts := []string{"-exec", self + " exec", "-timeout", "15m"}
	strict := os.Getenv("AMBIT_TEST_REQUIRE") != ""
	if *filter != "" {
		opts = append(opts, "-run", *filter)
	}
	noEBPF, err := eBPF(self)
	if err != nil {
		fmt.Fprintln(os.Stderr, "ambit-test:", err)
		return 2
	}
	defer sweep()
	missing := raceMissing()
	if missing != "" {
		fmt.Println("race detector off:", missing)
		code := runTests(opts, packages, strict, noEBPF, os.Stdout)
		if strict {
			return 1
		}
		return code
	}
	allocs := 0
	if *filter == "" {
		allocs = runAllocs(opts, packages, strict, noEBPF, os.Stdout) // first: it takes seconds
	}
	return max(allocs, runTests(append(opts, "-race"), packages, strict, noEBPF, os.Stdout))
}

// raceMissing says what keeps the race detector, which links with cgo, from
// working; "" when nothing does.
func raceMissing() string {
	cc := os.Getenv("CC")
	if cc == "" {
		cc = "gcc"
	}
	if _, err := exec.LookPath(cc); err != nil {
		return "no C compiler (" + cc + ") in PATH; install it with: apt-get install gcc libc6-dev"
	}
	return ""
}
