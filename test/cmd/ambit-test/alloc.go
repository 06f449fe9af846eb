package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// allocPackages are those with allocation budgets. The race detector allocates
// on its own account, so such tests carry the build tag !race and the word
// Alloc in their name, and run once more without it.
func allocPackages(packages []string) ([]string, error) {
	const format = `{{$p := .}}{{range .TestGoFiles}}{{$p.ImportPath}} {{$p.Dir}}/{{.}}{{"\n"}}{{end}}{{range .XTestGoFiles}}{{$p.ImportPath}} {{$p.Dir}}/{{.}}{{"\n"}}{{end}}`
	out, err := exec.Command("go", append([]string{"list", "-f", format}, packages...)...).Output()
	if err != nil {
		return nil, fmt.Errorf("list test files: %w", err)
	}
	var found []string
	for line := range strings.Lines(string(out)) {
		pkg, file, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			continue
		}
		src, err := os.ReadFile(filepath.Clean(file))
		if err != nil {
			return nil, err
		}
		if bytes.Contains(src, []byte("//go:build !race")) && (len(found) == 0 || found[len(found)-1] != pkg) {
			found = append(found, pkg)
		}
	}
	return found, nil
}

// runAllocs runs the allocation budgets of the packages.
func runAllocs(opts, packages []string, strict bool, noEBPF string, w io.Writer) int {
	found, err := allocPackages(packages)
	if err != nil {
		fmt.Fprintln(os.Stderr, "ambit-test:", err)
		return 2
	}
	if len(found) == 0 {
		return 0
	}
	fmt.Fprintln(w, "\nallocation budgets, without the race detector:")
	return runTests(append(opts, "-run", "Alloc"), found, strict, noEBPF, w)
}
