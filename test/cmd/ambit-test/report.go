package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/ambit-mesh/ambit/test/netlab"
)

// event is one line of `go test -json` (cmd/test2json).
type event struct {
	Action, Package, ImportPath, Test, Output, FailedBuild string
	Elapsed                                                float64
}

type testKey struct{ pkg, test string }

// report folds the event stream into lines for people.
type report struct {
	w                     io.Writer
	output                map[testKey][]string // of tests and packages that have not ended
	counts                map[string]int       // tests ended, by package
	skipped               []string
	noEBPF                string // the probe's words, where the kernel takes no programs; "" where it does
	lacking               int    // skips that say so too
	passed, failed, skips int
	failedTests           []string
}

// runTests runs the packages and returns the exit code: 1 when a test failed or,
// with strict, was skipped for another reason than noEBPF.
func runTests(opts, packages []string, strict bool, noEBPF string, w io.Writer) int {
	cmd := exec.Command("go", append(append([]string{"test", "-json"}, opts...), packages...)...)
	cmd.Stderr = os.Stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		fmt.Fprintln(os.Stderr, "ambit-test:", err)
		return 2
	}
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "ambit-test: start go test:", err)
		return 2
	}
	r := &report{w: w, noEBPF: noEBPF, output: map[testKey][]string{}, counts: map[string]int{}}
	r.read(pipe)
	err = cmd.Wait()
	return r.finish(exitCode(err), strict)
}

func (r *report) read(in io.Reader) {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) == nil {
				r.add(e)
			} else {
				fmt.Fprint(r.w, string(line))
			}
		}
		if err != nil {
			return
		}
	}
}

func (r *report) add(e event) {
	key := testKey{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		fmt.Fprint(r.w, e.Output)
	case "output":
		r.output[key] = append(r.output[key], e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			r.endPackage(e)
		} else {
			r.endTest(e)
		}
		delete(r.output, key)
	}
}

func (r *report) endTest(e event) {
	key := testKey{e.Package, e.Test}
	r.counts[e.Package]++
	switch e.Action {
	case "pass":
		r.passed++
	case "fail":
		r.failed++
		r.failedTests = append(r.failedTests, e.Package+" "+e.Test)
		fmt.Fprint(r.w, strings.Join(r.output[key], ""))
	case "skip":
		r.skips++
		if r.noEBPF != "" && strings.Contains(reason(r.output[key]), netlab.NoEBPF) {
			r.lacking++
			return
		}
		r.skipped = append(r.skipped, fmt.Sprintf("%s %s: %s", shortName(e.Package), e.Test, reason(r.output[key])))
	}
}

func (r *report) endPackage(e event) {
	switch {
	case e.Action == "fail":
		fmt.Fprint(r.w, strings.Join(r.output[testKey{e.Package, ""}], ""))
		fmt.Fprintf(r.w, "FAIL  %-40s %6.1fs\n", shortName(e.Package), e.Elapsed)
		if r.counts[e.Package] == 0 || e.FailedBuild != "" {
			r.failed++
			r.failedTests = append(r.failedTests, e.Package)
		}
	case r.counts[e.Package] > 0:
		fmt.Fprintf(r.w, "ok    %-40s %6.1fs  %d tests\n", shortName(e.Package), e.Elapsed, r.counts[e.Package])
	}
}

func (r *report) finish(code int, strict bool) int {
	if len(r.failedTests) > 0 {
		fmt.Fprintln(r.w, "\nfailed:")
		for _, t := range r.failedTests {
			fmt.Fprintln(r.w, "  "+t)
		}
	}
	if r.lacking > 0 {
		fmt.Fprintf(r.w, "\n%d tests of eBPF were skipped, which is no failure on a machine like this: %s\n", r.lacking, r.noEBPF)
	}
	if len(r.skipped) > 0 {
		slices.Sort(r.skipped)
		fmt.Fprintln(r.w, "\nskipped, because this machine or user lacks something:")
		for _, t := range r.skipped {
			fmt.Fprintln(r.w, "  "+t)
		}
		if strict && code == 0 {
			fmt.Fprintln(r.w, "AMBIT_TEST_REQUIRE is set: a skipped test is a failure")
			code = 1
		}
	}
	fmt.Fprintf(r.w, "\n%d passed, %d failed, %d skipped\n", r.passed, r.failed, r.skips)
	return code
}

// reason is what the test said when it skipped, without the framing lines.
func reason(output []string) string {
	var words []string
	for _, line := range output {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "=== ") || strings.HasPrefix(line, "--- ") {
			continue
		}
		words = append(words, line)
	}
	return strings.Join(words, " ")
}

func shortName(pkg string) string {
	return strings.TrimPrefix(pkg, "github.com/ambit-mesh/ambit/")
}
