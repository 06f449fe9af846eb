package dir

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	deny       = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny, namespace: demo}\nspec: {action: DENY, rules: [{from: [{source: {namespaces: [evil]}}]}]}\n"
	strictMTLS = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: demo}\nspec: {mtls: {mode: STRICT}}\n"
	mesh       = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |\n    trustDomain: td1\n    rootNamespace: demo\n"
)

// A directory is read, its files are edited while nobody runs, and it is read again.
func TestLastGoodPoliciesSurviveARestart(t *testing.T) {
	all := "+deny +istio +strict"
	tests := []struct {
		name     string
		edit     map[string]string // file → content, "" removes
		objects  string            // in force after the restart
		problems int
	}{
		{"nothing", nil, all, 0},
		{"unknown field", map[string]string{"a.yaml": strings.Replace(deny, "rules", "rulez", 1)}, all, 1},
		{"invalid value", map[string]string{"a.yaml": strings.Replace(deny, "DENY", "DENIED", 1)}, all, 1},
		{"cut off", map[string]string{"a.yaml": deny[:len(deny)-8]}, all, 1},
		{"slip in the kind", map[string]string{"a.yaml": strings.Replace(deny, "AuthorizationPolicy", "AuthorisationPolicy", 1)}, all, 1},
		{"broken mode", map[string]string{"b.yaml": strings.Replace(strictMTLS, "STRICT", "STRICKT", 1)}, all, 1},
		{"broken mesh configuration", map[string]string{"c.yaml": strings.Replace(mesh, "rootN", "rotN", 1)}, all, 1},
		{"broken ConfigMap around it", map[string]string{"c.yaml": mesh + "more: x\n"}, all, 1},
		{"broken and in another file", map[string]string{"a.yaml": "", "z.yaml": strings.Replace(deny, "rules", "rulez", 1)}, all, 1},
		{"broken here, good there", map[string]string{"a.yaml": strings.Replace(deny, "rules", "rulez", 1), "z.yaml": deny}, all, 1},
		{"object gone", map[string]string{"a.yaml": "# nothing\n"}, "+istio +strict", 0},
		{"file gone", map[string]string{"a.yaml": ""}, "+istio +strict", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir, lastGood := t.TempDir(), filepath.Join(t.TempDir(), "last-good")
			w, stop := startTestWatch(t, dir, lastGood)
			w.want("start", "", "")
			w.write("a.yaml", deny)
			w.write("b.yaml", strictMTLS)
			w.write("c.yaml", mesh)
			w.want("good", all, "")
			stop()
			for name, content := range tt.edit {
				if w.write(name, content); content == "" {
					_ = os.Remove(filepath.Join(dir, name)) // written above
				}
			}
			for _, again := range []string{"restart", "another restart"} {
				w, stop = startTestWatch(t, dir, lastGood)
				c := <-w.changes
				stop()
				var got []string
				for _, o := range c.Upserts {
					got = append(got, "+"+o.Name)
				}
				if slices.Sort(got); strings.Join(got, " ") != tt.objects || len(c.Problems) != tt.problems {
					t.Errorf("%s: in force are %q, want %q; problems %v, want %d", again, got, tt.objects, c.Problems, tt.problems)
				}
			}
			if want := strings.Count(tt.objects, "+"); countFiles(t, lastGood) != want {
				t.Errorf("%d files are kept, want %d", countFiles(t, lastGood), want)
			}
		})
	}
}

// Without them, traffic would go past the policy at a waypoint.
func TestWhatLeadsToAWaypointSurvivesARestart(t *testing.T) {
	const (
		gateway   = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: wp, namespace: demo}\nspec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}\n"
		namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: demo, labels: {istio.io/use-waypoint: wp}}\n"
		service   = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: demo, labels: {istio.io/use-waypoint: wp}}\nspec: {ports: [{port: 80}]}\n"
		other     = "apiVersion: v1\nkind: Service\nmetadata: {name: other, namespace: demo}\nspec: {ports: [{port: 80}]}\n"
	)
	dir, lastGood := t.TempDir(), filepath.Join(t.TempDir(), "last-good")
	w, stop := startTestWatch(t, dir, lastGood)
	w.want("start", "", "")
	w.write("a.yaml", gateway+"---\n"+namespace+"---\n"+service+"---\n"+other)
	w.want("good", "+demo +other +web +wp", "")
	stop()
	broken := strings.NewReplacer("port: ", "prt: ", "labels: ", "labls: ")
	w.write("a.yaml", broken.Replace(gateway+"---\n"+namespace+"---\n"+service+"---\n"+other))
	w, stop = startTestWatch(t, dir, lastGood)
	c := <-w.changes
	var got []string
	for _, o := range c.Upserts {
		got = append(got, o.GVK.Kind+" "+o.Name)
	}
	if slices.Sort(got); strings.Join(got, ", ") != "Gateway wp, Namespace demo, Service web" {
		t.Errorf("in force after the restart are %v", got)
	}
	// A service that has left its waypoint is not brought back to it.
	w.write("a.yaml", strings.ReplaceAll(service, "wp", "none"))
	<-w.changes
	stop()
	if n := countFiles(t, lastGood); n != 0 {
		t.Errorf("%d files are kept", n)
	}
}

func countFiles(t *testing.T, dir string) (n int) {
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			n++
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return n
}

// What is remembered is decoded as strictly as any file.
func TestGarbageInTheMemoryIsIgnored(t *testing.T) {
	dir, lastGood := t.TempDir(), t.TempDir()
	for name, text := range map[string]string{
		"empty": "", "garbage": "\x00{", "no-policy": `{"file": "x", "object": {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}}}`,
		"unknown-field": `{"file": "` + dir + `/a.yaml", "object": {"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"name": "n"}, "spek": {}}}`,
	} {
		if err := os.WriteFile(filepath.Join(lastGood, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "a.yaml"), []byte("kind: [\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w, stop := startTestWatch(t, dir, lastGood)
	defer stop()
	if c := <-w.changes; len(c.Upserts) > 0 {
		t.Errorf("in force: %v", c.Upserts)
	}
}

// An object that was moved out of a file which is broken now is in force as it is,
// not as it was.
func TestWhatAFileSaysNowWinsOverALastGoodVersion(t *testing.T) {
	table := NewTable()
	inForce := func(why, file string, problems int) {
		t.Helper()
		c := table.Change()
		if o := table.inForce[id{"security.istio.io", "AuthorizationPolicy", "demo", "deny"}]; o == nil || o.File != file || len(c.Problems) != problems {
			t.Errorf("%s: in force is %+v, want that of %s; problems %v", why, o, file, c.Problems)
		}
	}
	table.Put("a.yaml", []byte(deny))
	inForce("at first", "a.yaml", 0)
	table.Put("a.yaml", []byte("kind: [\n"))
	inForce("broken", "a.yaml", 1)
	table.Put("z.yaml", []byte(strings.Replace(deny, "evil", "worse", 1)))
	inForce("moved", "z.yaml", 1)
	table.Put("a.yaml", []byte(deny))
	inForce("repaired", "a.yaml", 1)
	table.Put("a.yaml", []byte("kind: [\n"))
	inForce("broken again", "z.yaml", 1)
	table.Remove("z.yaml")
	inForce("moved back", "a.yaml", 1)
}

// A mistake around the mesh configuration must not take it out of force, which
// would rename every identity.
func TestABrokenConfigMapKeepsTheMeshConfiguration(t *testing.T) {
	table := NewTable()
	table.Put("c.yaml", []byte(mesh))
	if c := table.Change(); len(c.Upserts) != 1 {
		t.Fatalf("got %v", c.Upserts)
	}
	table.Put("c.yaml", []byte(mesh+"more: x\n"))
	if c := table.Change(); len(c.Deletes) > 0 || len(c.Problems) != 1 {
		t.Errorf("deletes %v, problems %v", c.Deletes, c.Problems)
	}
}
