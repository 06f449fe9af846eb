package arch

import (
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/ambit-mesh/ambit"

// pkg is the part of `go list -json` that the rules need.
type pkg struct {
	Dir, ImportPath, Name      string
	GoFiles                    []string
	Imports, TestImports, Deps []string
	XTestImports               []string
}

// rel is the path inside the module: "xds/mesh".
func (p pkg) rel() string { return strings.TrimPrefix(p.ImportPath, module+"/") }

var packages = sync.OnceValues(func() ([]pkg, error) {
	out, err := exec.Command("go", "list", "-json=Dir,ImportPath,Name,GoFiles,Imports,TestImports,XTestImports,Deps", module+"/...").Output()
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			return nil, errors.New(string(exit.Stderr))
		}
		return nil, err
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
})

func list(t *testing.T) []pkg {
	t.Helper()
	all, err := packages()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	return all
}

// inside says whether an import path is the folder or below it.
func inside(path string, folders ...string) bool {
	return slices.ContainsFunc(folders, func(f string) bool {
		f = strings.TrimSuffix(f, "/")
		return path == f || strings.HasPrefix(path, f+"/")
	})
}

// component is the first folder of an import path of this module, "" for others.
func component(path string) string {
	rel, ok := strings.CutPrefix(path, module+"/")
	if !ok {
		return ""
	}
	return strings.SplitN(rel, "/", 2)[0]
}

// layers is the import rule: a component may import those listed, and itself.
var layers = map[string][]string{
	"xds":      {},
	"ebpf":     {"xds"},
	"ztunnel":  {"xds", "ebpf"},
	"waypoint": {"xds", "ebpf", "ztunnel"},
	"deploy":   {"xds", "ebpf", "ztunnel", "waypoint"},
	"perf":     {"xds", "ebpf", "ztunnel", "waypoint", "test"},
	"test":     {"xds", "ebpf", "ztunnel", "waypoint", "deploy", "perf"},
}

func TestComponentsImportDownwardsOnly(t *testing.T) {
	for _, p := range list(t) {
		from := component(p.ImportPath)
		allowed, known := layers[from]
		if !known {
			t.Errorf("%s: the top level is fixed; %q is not part of it", p.ImportPath, from)
		}
		for _, imp := range p.Imports {
			if to := component(imp); to != "" && to != from && !slices.Contains(allowed, to) {
				t.Errorf("%s imports %s: arrows go xds, ebpf, ztunnel, waypoint, then deploy, perf and test; shipped code never imports test", p.rel(), imp)
			}
		}
	}
}

// never lists what a set of packages must not reach, and why.
var never = []struct {
	of, deps []string
	why      string
}{
	{
		of:   []string{"ztunnel", "waypoint"},
		deps: []string{"k8s.io", "sigs.k8s.io"},
		why:  "proxies learn everything over xDS, so they stay small and run anywhere",
	},
	{
		of:   []string{"ztunnel", "waypoint"},
		deps: []string{module + "/xds/kube", module + "/xds/dir", module + "/xds/crd", module + "/xds/derive", module + "/xds/delta", module + "/xds/serve", module + "/xds/ca"},
		why:  "these are the control plane's own",
	},
	{
		of:   []string{"xds/identity", "xds/mesh", "xds/policy"},
		deps: []string{"net/http", "os/exec", "google.golang.org/grpc", "math/rand", "math/rand/v2"},
		why:  "the vocabulary is pure: no I/O, no clock, no chance",
	},
	{
		of:   []string{"xds", "ebpf", "ztunnel", "waypoint", "deploy"},
		deps: []string{"testing"},
		why:  "test support does not ship",
	},
	{
		of:   []string{"xds", "ebpf", "ztunnel", "waypoint", "deploy", "test"},
		deps: []string{"fortio.org"},
		why:  "it makes loads, for perf alone",
	},
}

// TestNeverReach checks everything linked, and for the vocabulary only what it
// imports itself: go-spiffe and protobuf reach net/http on their own account.
func TestNeverReach(t *testing.T) {
	for _, p := range list(t) {
		for _, rule := range never {
			if !inside(p.rel(), rule.of...) {
				continue
			}
			reached := p.Deps
			if rule.of[0] == "xds/identity" {
				reached = p.Imports
			}
			for _, dep := range reached {
				if inside(dep, rule.deps...) {
					t.Errorf("%s reaches %s: %s", p.rel(), dep, rule.why)
				}
			}
		}
	}
}

func TestOnlyMainsAndTestsImportApp(t *testing.T) {
	for _, p := range list(t) {
		for _, imp := range p.Imports {
			if component(imp) != "" && strings.HasSuffix(imp, "/app") && p.Name != "main" && !inside(p.rel(), "test", "perf") {
				t.Errorf("%s imports %s: a component's parts meet in its app, which only its main starts", p.rel(), imp)
			}
		}
	}
}

func TestPureCodeReadsNoClock(t *testing.T) {
	for _, p := range list(t) {
		if !inside(p.rel(), "xds/identity", "xds/mesh", "xds/policy", "xds/derive", "xds/delta") {
			continue
		}
		for _, file := range p.GoFiles {
			path := filepath.Join(p.Dir, file)
			parsed, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			if usesSelector(parsed, "time", "Now") {
				t.Errorf("%s/%s calls time.Now: time is a parameter in pure code", p.rel(), file)
			}
		}
	}
}

func TestEveryPackageHasOneDoc(t *testing.T) {
	for _, p := range list(t) {
		docs := 0
		for _, file := range p.GoFiles {
			parsed, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if parsed.Doc != nil {
				docs++
			}
		}
		if docs != 1 && len(p.GoFiles) > 0 {
			t.Errorf("%s: %d package docs, want one", p.rel(), docs)
		}
	}
}

func TestNamesSayWhatAPackageIs(t *testing.T) {
	for _, p := range list(t) {
		for _, bad := range []string{"util", "utils", "common", "helper", "helpers", "misc", "types", "base"} {
			if p.Name == bad {
				t.Errorf("%s: name the concept, not %q", p.rel(), bad)
			}
		}
	}
}
