package attach_test

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
	"github.com/ambit-mesh/ambit/ebpf/netns"
)

func facts() attach.Facts {
	return attach.Facts{
		Node: "n1", Excluded: []string{"kube-system"},
		Namespaces: map[string]attach.Namespace{"shop": {InMesh: true}, "plain": {}, "both": {Mixed: true}, "kube-system": {}},
		Pods:       map[string]bool{"in": true, "out": false},
	}
}

func TestDecisionsWithoutTheAgent(t *testing.T) {
	for _, tc := range []struct {
		name, namespace, uid string
		pass                 bool
		why                  string
	}{
		{"excluded, whoever it is", "kube-system", "in", true, "excluded"},
		{"known to be in", "plain", "in", false, "the pod is in"},
		{"known to be out, in a namespace of the mesh", "shop", "out", true, "the pod is not"},
		{"made since, namespace in the mesh", "shop", "other", false, "namespace is in"},
		{"made since, namespace outside", "plain", "other", true, "namespace is not"},
		{"made since, namespace outside with pods inside", "both", "other", false, "has pods in the mesh"},
		{"a namespace nobody knows", "new", "other", false, "not known"},
		{"no uid, namespace outside", "plain", "", true, "namespace is not"},
		{"no uid, namespace in the mesh", "shop", "", false, "namespace is in"},
	} {
		f := facts()
		if pass, why := f.Decide(tc.namespace, tc.uid); pass != tc.pass || !strings.Contains(why, tc.why) {
			t.Errorf("%s: %t (%s), want %t (%s)", tc.name, pass, why, tc.pass, tc.why)
		}
	}
	var none *attach.Facts
	if pass, _ := none.Decide("plain", "out"); pass {
		t.Error("without facts a pod starts")
	}
}

func TestFactsSurvive(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	w, err := attach.OpenFacts(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Write(facts()); err != nil {
		t.Fatal(err)
	}
	got, err := attach.ReadFacts(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := facts()
	want.Layout = got.Layout
	if !reflect.DeepEqual(*got, want) {
		t.Errorf("read %+v, want %+v", *got, want)
	}
	path := filepath.Join(dir, "facts.json")
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Write(facts()); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(path); err != nil || !os.SameFile(before, after) {
		t.Errorf("facts that did not change were written again: %v", err)
	}
}

// Facts of another time could let a pod start that has joined since.
func TestFactsThatCannotBeWrittenAreNone(t *testing.T) {
	dir := t.TempDir()
	w, err := attach.OpenFacts(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Write(facts()); err != nil {
		t.Fatal(err)
	}
	big := facts()
	big.Node = strings.Repeat("x", 9<<20)
	if err := w.Write(big); err == nil {
		t.Error("facts that nobody reads were written")
	}
	if f, err := attach.ReadFacts(dir); err == nil {
		t.Errorf("the old facts are still there: %+v", f)
	}
	if err := w.Write(facts()); err != nil {
		t.Fatal(err)
	}
	if _, err := attach.ReadFacts(dir); err != nil {
		t.Errorf("after that: %v", err)
	}
}

func TestFactsThatCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"half": `{"layout":1,"namespaces":{"sh`, "another layout": `{"layout":2}`, "empty": "", "no layout": "{}",
	} {
		if err := os.WriteFile(filepath.Join(dir, "facts.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := attach.ReadFacts(dir)
		if err == nil || !strings.Contains(err.Error(), "facts.json") {
			t.Errorf("%s: %v; want an error that names the file", name, err)
		}
		if pass, _ := f.Decide("plain", "out"); pass {
			t.Errorf("%s: a pod starts", name)
		}
	}
}

func TestAttachmentsAreKept(t *testing.T) {
	dir := t.TempDir()
	s, err := attach.OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	here := pod()
	here.NetNS, here.Inode = "/proc/self/ns/net", inode(t, "/proc/self/ns/net")
	reused, gone, bad := here, here, here
	reused.ContainerID, reused.Inode = "c2", 1 // the path is another namespace's now
	gone.ContainerID, gone.NetNS = "c3", filepath.Join(dir, "gone")
	bad.ContainerID = "../c4"
	for _, a := range []attach.Attachment{here, reused, gone} {
		if err := s.Put(a); err != nil {
			t.Fatal(err)
		}
	}
	if s.Put(bad) == nil {
		t.Error("a container id outside the directory was kept")
	}
	files := func() int {
		entries, err := os.ReadDir(filepath.Join(dir, "attachments"))
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	for name, text := range map[string]string{"bad.json": "{", ".ambit-half": "{"} {
		if err := os.WriteFile(filepath.Join(dir, "attachments", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.List()
	if err == nil || !strings.Contains(err.Error(), "bad.json") {
		t.Errorf("List: %v; want an error that names the bad file", err)
	}
	if len(got) != 1 || !reflect.DeepEqual(got[0], here) {
		t.Errorf("List: %+v, want %+v", got, here)
	}
	if n := files(); n != 2 {
		t.Errorf("%d files, want the good one and the bad one", n)
	}
	for _, id := range []string{"c1", "c1", "../../x"} {
		if err := s.Remove(id); err != nil {
			t.Errorf("remove %s: %v", id, err)
		}
	}
	if n := files(); n != 1 {
		t.Errorf("%d files, want the bad one", n)
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	n, err := netns.Inode(path)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
