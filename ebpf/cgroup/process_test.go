package cgroup

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/test/leak"
	"github.com/ambit-mesh/ambit/test/netlab"
)

func TestMain(m *testing.M) { leak.Main(m) }

func TestPlace(t *testing.T) {
	for _, tc := range []struct {
		name, root, path, want string
		outside                bool
	}{
		{"whole hierarchy", "/", "/kubepods/a", "/m/kubepods/a", false},
		{"the root itself", "/", "/", "/m", false},
		{"a part of it", "/kubepods", "/kubepods/a", "/m/a", false},
		{"another part", "/kubepods", "/system/a", "", true},
		{"a name that begins alike", "/kube", "/kubepods/a", "", true},
		{"above the reader's namespace", "/", "/../../b", "", true},
		{"the mount is above the reader's namespace", "/../..", "/a", "", true},
		{"just above", "/", "/..", "", true},
		{"a directory with such a name", "/", "/..a", "/m/..a", false},
	} {
		got, err := place("/m", tc.root, tc.path)
		if got != tc.want || errors.Is(err, ErrOutside) != tc.outside {
			t.Errorf("%s: %q, %v; want %q", tc.name, got, err, tc.want)
		}
	}
}

func TestMountOf(t *testing.T) {
	const info = `24 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw
25 24 0:23 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 cgroup rw
26 24 0:23 /lab /tmp/a\040b rw - cgroup2 none rw
27 24 0:23 /other /tmp/a\040b rw - cgroup2 none rw
28 24 0:24 / /sys/fs/cgroup/unified/v1 rw - cgroup cgroup rw,cpu
short line
`
	for _, tc := range []struct{ dir, point, root string }{
		{"/sys/fs/cgroup/unified", "/sys/fs/cgroup/unified", "/"},
		{"/sys/fs/cgroup/unified/kubepods", "/sys/fs/cgroup/unified", "/"},
		{"/sys/fs/cgroup/unifiedly", "", ""},
		{"/tmp/a b/c", "/tmp/a b", "/other"},
		{"/sys/fs/cgroup", "", ""},
	} {
		point, root, err := mountOf(info, tc.dir)
		if point != tc.point || root != tc.root || (err == nil) != (tc.point != "") {
			t.Errorf("%s: %q %q %v, want %q %q", tc.dir, point, root, err, tc.point, tc.root)
		}
	}
}

func TestUnified(t *testing.T) {
	for _, tc := range []struct{ data, want string }{
		{"0::/a/b\n", "/a/b"},
		{"12:cpu:/x\n1:name=systemd:/y\n0::/\n", "/"},
		{"0::/with:colons and spaces\n", "/with:colons and spaces"},
		{"12:cpu:/x\n", ""},
		{"0::relative\n", ""},
		{"0::/gone (deleted)\n", ""},
		{"", ""},
	} {
		if got, err := unified(tc.data); got != tc.want || (err == nil) != (tc.want != "") {
			t.Errorf("%q: %q, %v; want %q", tc.data, got, err, tc.want)
		}
	}
}

func FuzzMountInfo(f *testing.F) {
	f.Add("25 24 0:23 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 cgroup rw\n", "/sys/fs/cgroup/unified/a", "0::/a\n")
	f.Add("1 1 1:1 \\134 /\\ - - cgroup2", "/", "0::/..\n")
	f.Fuzz(func(t *testing.T, info, near, data string) {
		point, root, err := mountOf(info, near)
		if err != nil {
			return
		}
		path, err := unified(data)
		if err != nil {
			return
		}
		if dir, err := place(point, root, path); err == nil && !Within(dir, point) {
			t.Errorf("%q below %q shown at %q is %q, outside it", path, root, point, dir)
		}
	})
}

func TestOfProcess(t *testing.T) {
	cg := netlab.MustCgroups(t, "a")
	root := strings.TrimSuffix(cg[0].Path, "/a")
	got, err := OfProcess(os.Getpid(), cg[0].Path)
	if err != nil || got != root {
		t.Errorf("this process is in %q, %v; want %q", got, err, root)
	}
	if got, err := search(os.Getpid(), root); err != nil || got != root {
		t.Errorf("this process was found in %q, %v; want %q", got, err, root)
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(cg[0].Do(func() error {
		got, err := search(unix.Gettid(), root)
		if got != cg[0].Path {
			t.Errorf("a thread was found in %q, want %q", got, cg[0].Path)
		}
		return err
	}))
	if got, err := search(os.Getpid(), t.TempDir()); !errors.Is(err, ErrOutside) {
		t.Errorf("found in %q, %v", got, err)
	}
	ids, err := Processes(root, 10)
	if err != nil || len(ids) == 0 || ids[0] != os.Getpid() {
		t.Errorf("processes are %v, %v; want this one", ids, err)
	}
	if _, err := Processes(root, 0); err == nil {
		t.Error("more processes than the limit were listed")
	}
	for _, pid := range []int{0, 1 << 30} {
		if dir, err := OfProcess(pid, root); err == nil {
			t.Errorf("process %d is in %s", pid, dir)
		}
	}
	if dir, err := OfProcess(os.Getpid(), t.TempDir()); err == nil {
		t.Errorf("outside cgroup2 this process is in %s", dir)
	}
}
