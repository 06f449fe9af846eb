package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// fuzzAll runs each fuzz target of the packages for the duration, one after the
// other as `go test` requires.
func fuzzAll(packages []string, duration string) int {
	out, err := exec.Command("go", append([]string{"test", "-list", "^Fuzz"}, packages...)...).Output()
	if err != nil {
		fmt.Fprintln(os.Stderr, "ambit-test: list fuzz targets:", err)
		return 2
	}
	// `go test -list` prints a package's targets, then its closing line.
	var targets []string
	ran, failed := 0, 0
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "Fuzz") {
			targets = append(targets, line)
			continue
		}
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "ok" {
			continue
		}
		for _, target := range targets {
			ran++
			fmt.Printf("fuzz  %s %s\n", shortName(fields[1]), target)
			cmd := exec.Command("go", "test", "-run", "^$", "-fuzz", "^"+target+"$", "-fuzztime", duration, fields[1])
			if output, err := cmd.CombinedOutput(); err != nil && !endedLate(output) {
				failed++
				fmt.Printf("%s\nFAIL  %s %s\n", output, shortName(fields[1]), target)
			}
		}
		targets = nil
	}
	fmt.Printf("\nfuzz: %d targets, %d failed\n", ran, failed)
	return min(failed, 1)
}

// endedLate reports a run that found nothing but did not end in time: on a busy
// machine the fuzzer's workers miss the end of -fuzztime and the go command
// calls that a failure. A finding always names the input that it wrote.
func endedLate(output []byte) bool {
	return bytes.Contains(output, []byte("context deadline exceeded")) && !bytes.Contains(output, []byte("Failing input written"))
}
