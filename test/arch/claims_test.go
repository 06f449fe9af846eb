package arch

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// claims are the pages that name the tests behind what they say.
var claims = []string{".github/SECURITY.md", "deploy/GUIDE.md", "test/features.md"}

var named = regexp.MustCompile("`([a-z0-9_/-]+)\\.((?:Test|Fuzz|Benchmark)[A-Za-z0-9_]+)`")

// A page that names a test that does not exist claims what nothing proves.
func TestNamedTestsExist(t *testing.T) {
	root := filepath.Join("..", "..")
	functions := map[string]string{} // directory → its tests' source
	for _, page := range claims {
		text, err := os.ReadFile(filepath.Join(root, page))
		if err != nil {
			t.Error(err)
			continue
		}
		for _, m := range named.FindAllStringSubmatch(string(text), -1) {
			dir, name := m[1], m[2]
			if _, ok := functions[dir]; !ok {
				functions[dir] = testSource(t, filepath.Join(root, dir))
			}
			if !strings.Contains(functions[dir], "func "+name+"(") {
				t.Errorf("%s names %s.%s, which does not exist", page, dir, name)
			}
		}
	}
}

func testSource(t *testing.T, dir string) string {
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(b)
	}
	return all.String()
}
