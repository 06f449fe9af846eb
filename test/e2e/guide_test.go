package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/test/netlab"
)

// block is a script of the guide and what it must print.
type block struct {
	line   int
	script string
	want   []string
}

// blocks reads the fences of a page: sh is run, a text that follows is compared.
func blocks(t *testing.T, path string) []block {
	t.Helper()
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var (
		all  []block
		kind string
		body []string
	)
	for i, l := range strings.Split(string(page), "\n") {
		rest, fence := strings.CutPrefix(l, "```")
		switch {
		case fence && kind == "":
			kind, body = rest, nil
		case fence:
			if kind == "sh" {
				all = append(all, block{line: i - len(body) + 1, script: strings.Join(body, "\n")})
			} else if kind == "text" && len(all) > 0 {
				all[len(all)-1].want = body
			}
			kind = ""
		case kind != "":
			body = append(body, l)
		}
	}
	return all
}

// The guide's commands do what the guide says.
func TestGuide(t *testing.T) {
	for _, tool := range []string{"bash", "dig", "ss", "curl"} {
		if _, err := exec.LookPath(tool); err != nil {
			if netlab.Required() {
				t.Fatalf("the guide needs %s: apt-get install dnsutils iproute2 curl", tool)
			}
			t.Skipf("the guide needs %s: apt-get install dnsutils iproute2 curl", tool)
		}
	}
	l := up(t, either) // says whether labs are to be had here
	l.must("down")
	dir := t.TempDir()
	wrapper := fmt.Sprintf("#!/bin/sh\nexec %s/ambit-lab --name guide-%d \"$@\"\n", bin, os.Getpid())
	if err := os.WriteFile(filepath.Join(dir, "ambit-lab"), []byte(wrapper), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = exec.Command(filepath.Join(dir, "ambit-lab"), "down").Run() }) // the page's last command, unless it failed before
	all := blocks(t, "../../deploy/GUIDE.md")
	if len(all) < 5 {
		t.Fatalf("the guide has %d scripts", len(all))
	}
	for _, b := range all {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		// A second is enough for who reads; a machine that runs many tests gets more.
		script := strings.NewReplacer("sleep 1\n", "sleep 3\n", "sleep 1;", "sleep 3;", " find-me 4s ", " find-me 9s ").Replace(b.script)
		cmd := exec.CommandContext(ctx, "bash", "-e", "-o", "pipefail", "-c", script)
		cmd.Env = append(os.Environ(), "PATH="+dir+":"+bin+":"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		cancel()
		if err != nil {
			t.Fatalf("deploy/GUIDE.md:%d: %v\n%s\nprinted:\n%s", b.line, err, b.script, out)
		}
		for _, want := range b.want {
			if !strings.Contains(string(out), want) && want != "..." {
				t.Errorf("deploy/GUIDE.md:%d: want %q in what this prints:\n%s\n%s", b.line, want, b.script, out)
			}
		}
	}
}
