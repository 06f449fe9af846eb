package origin

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/test/leak"
)

func TestMain(m *testing.M) { leak.Main(m) }

func named(comm string) (o Origin) {
	copy(o.Comm[:], comm)
	return o
}

func TestComm(t *testing.T) {
	for comm, want := range map[string]string{
		"curl":             "curl",
		"":                 "",
		"http-nio-8080-e":  "http-nio-8080-e",
		"a b:c/d":          "a b:c/d",
		"sixteen bytes!!!": "sixteen bytes!!!",
		"x\x00y":           "x",
		"\"} level=error":  "?} level=error",
		"a\nb\x1b[31m\x7f": "a?b?[31m?",
		"\xff\xfe\u202e":   "?????",
		"back\\slash `'":   "back?slash ??",
	} {
		if got := Comm(named(comm)); got != want {
			t.Errorf("%q is shown as %q, want %q", comm, got, want)
		}
	}
}

func FuzzPrintable(f *testing.F) {
	for _, s := range []string{"curl", "\x1b]0;x\a", "a\"b", "\xff", strings.Repeat("x", 200)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		got := Printable(name)
		if len(got) > maxName || len(name) <= maxName && len(got) != len(name) {
			t.Errorf("%q is shown as %q", name, got)
		}
		if quoted := strconv.Quote(got); quoted != `"`+got+`"` {
			t.Errorf("%q is shown as %s", name, quoted)
		}
		if Printable(got) != got {
			t.Errorf("%q is not shown as itself", got)
		}
	})
}

func TestContainerID(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	uid := "1f2e3d4c-0000-4000-8000-123456789abc"
	slice := "kubepods-burstable-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
	inner := strings.Repeat("f", 64)
	for cgroup, want := range map[string]string{
		"/kubepods/burstable/pod" + uid + "/" + id:                                               id[:shownID],
		"/kubepods/pod" + uid + "/" + id:                                                         id[:shownID],
		"/kubepods.slice/kubepods-burstable.slice/" + slice + "/cri-containerd-" + id + ".scope": id[:shownID],
		"/kubepods.slice/" + slice + "/crio-" + id + ".scope":                                    id[:shownID],
		"/kubepods.slice/" + slice + "/crio-" + id + ".scope/container":                          id[:shownID],
		"/kubepods.slice/" + slice + "/docker-" + id + ".scope/system.slice/docker-" + inner:     id[:shownID],
		"/system.slice/containerd.service/" + slice + ":cri-containerd:" + id:                    "", // the runtime's own, of no pod's directory
		"/docker/" + inner + "/kubelet/kubepods/burstable/pod" + uid + "/" + id:                  id[:shownID],
		"/../../pod" + uid + "/" + id:                                                            id[:shownID],
		"/system.slice/docker-" + id + ".scope":                                                  "",
		"/kubepods/burstable/pod" + uid:                                                          "",
		"/kubepods/burstable/pod" + uid + "/" + id[:63]:                                          "",
		"/kubepods/burstable/pod" + uid + "/" + strings.ToUpper(id):                              "",
		"/": "",
		"":  "",
	} {
		if got := containerID(cgroup); got != want {
			t.Errorf("%s: container %q, want %q", cgroup, got, want)
		}
	}
}

func FuzzContainerID(f *testing.F) {
	f.Add("/kubepods/podx/" + strings.Repeat("a", 64))
	f.Add("0::/../kubepods-pod.slice/cri-containerd-" + strings.Repeat("0", 64) + ".scope")
	f.Fuzz(func(t *testing.T, cgroup string) {
		if id := containerID(cgroup); id != "" && (len(id) != shownID || !strings.Contains(cgroup, id)) {
			t.Errorf("%q: container %q", cgroup, id)
		}
	})
}

// ownProc is what /proc tells of this process, with files of the test's.
func ownProc(t *testing.T, pid uint32, exe, cgroup string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil || st.Ino != initPIDNamespace {
		t.Skip("needs the first PID namespace")
	}
	dir := t.TempDir()
	own := filepath.Join(dir, strconv.FormatUint(uint64(pid), 10))
	for _, err := range []error{
		os.MkdirAll(filepath.Join(dir, "self/ns"), 0o755), os.Symlink("/proc/self/ns/pid", filepath.Join(dir, "self/ns/pid")),
		os.Mkdir(own, 0o755), os.Symlink(exe, filepath.Join(own, "exe")), os.WriteFile(filepath.Join(own, "cgroup"), []byte(cgroup), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestNamesOfAProcess(t *testing.T) {
	id := strings.Repeat("ab", 32)
	proc := ownProc(t, 42, "/usr/bin/cu\nrl (deleted)", "1:cpu:/x\n0::/kubepods/pod1/"+id+"\n")
	n := New(Config{Proc: proc, Cgroups: []string{}})
	o := Origin{PID: 42, Cgroup: 7}
	n.Note(o)
	if len(n.queue) != 1 {
		t.Fatal("an unknown process is not asked for")
	}
	n.learn(<-n.queue)
	if exe, container := n.Of(o); exe != "cu?rl" || container != id[:shownID] {
		t.Errorf("executable %q, container %q", exe, container)
	}
	n.Note(o) // known already
	gone := Origin{PID: 43, Cgroup: 7}
	n.learn(gone)
	if exe, container := n.Of(gone); exe != "" || container != "" {
		t.Errorf("of a process that is gone: executable %q, container %q", exe, container)
	}
	n.Note(Origin{})
	if len(n.queue) != 0 {
		t.Errorf("%d origins are asked for without need", len(n.queue))
	}
}

// TestNamesAreBounded: connections of endless new processes are told apart from a
// bounded number of them, and nobody waits.
func TestNamesAreBounded(t *testing.T) {
	n := New(Config{Proc: ownProc(t, 1, "/init", "0::/\n"), Cgroups: []string{}})
	for i := range uint32(2 * maxKnown) {
		n.Note(Origin{PID: i + 1, Cgroup: uint64(i)})
		if i < maxKnown+10 {
			select {
			case o := <-n.queue:
				n.learn(o)
			default:
			}
		}
	}
	if len(n.queue) != queued || len(n.processes) > maxKnown || len(n.containers) > maxKnown {
		t.Errorf("%d queued, %d processes, %d containers", len(n.queue), len(n.processes), len(n.containers))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.Run(ctx); err != nil {
		t.Error(err)
	}
}

// TestContainersAreFoundByWalking a directory in place of a cgroup hierarchy: both
// have inode numbers.
func TestContainersAreFoundByWalking(t *testing.T) {
	id := strings.Repeat("c0", 32)
	root := t.TempDir()
	dir := filepath.Join(root, "kubepods/pod1", id, "app")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	n := New(Config{Proc: t.TempDir(), Cgroups: []string{}})
	n.root = root
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	nowhere, here := Origin{PID: 1, Cgroup: 1 << 60}, Origin{PID: 1, Cgroup: st.Ino}
	n.learn(nowhere)
	if _, container := n.Of(here); container != id[:shownID] {
		t.Errorf("container %q, want %q", container, id[:shownID])
	}
	for _, o := range []Origin{nowhere, here} {
		if n.Note(o); len(n.queue) != 0 {
			t.Errorf("cgroup %d would be looked for again", o.Cgroup)
		}
	}
	// Not before the pause is over.
	late := filepath.Join(root, "kubepods/pod2", strings.Repeat("d1", 32))
	if err := os.MkdirAll(late, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(late, &st); err != nil {
		t.Fatal(err)
	}
	o := Origin{PID: 2, Cgroup: st.Ino}
	n.learn(o)
	if _, container := n.Of(o); container != "" {
		t.Errorf("container %q before the hierarchy was walked again", container)
	}
	n.walked = n.walked.Add(-walkPause)
	n.learn(o)
	if _, container := n.Of(o); container != "d1d1d1d1d1d1d" {
		t.Errorf("container %q after the hierarchy was walked again", container)
	}
}

// TestPodsWithoutOriginsAreNotAsked over and over.
func TestPodsWithoutOriginsAreNotAsked(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		c, err := net.Dial("tcp4", ln.Addr().String())
		if err == nil {
			defer c.Close()
			_, _ = c.Read(make([]byte, 1))
		}
	}()
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var r Reader
	var o Origin
	r.Read(c, &o)
	if o != (Origin{}) || r.skip.Load() != askAgain {
		t.Errorf("a connection that nobody captured: %+v, %d", o, r.skip.Load())
	}
	for i := range askAgain {
		r.Read(c, &o)
		if got := int(r.skip.Load()); got != askAgain-1-i {
			t.Fatal(fmt.Sprint("after connection ", i, ": ", got))
		}
	}
	r.Read(c, &o)
	if r.skip.Load() != askAgain {
		t.Error("the pod is never asked again")
	}
}
