package app

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

func check(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// choice is what choose needs.
type choice struct {
	cfg  Config
	home *netns.NS
	pod  *netlab.Host
	log  strings.Builder
}

func newChoice(t *testing.T) *choice {
	t.Helper()
	cg := netlab.MustCgroups(t, "proxy")
	c := &choice{pod: netlab.MustHost(t, "pod"), cfg: Config{
		CgroupRoot: filepath.Dir(cg[0].Path), BPFFSDir: filepath.Join(netlab.MustBPFFS(t), "ambit"),
	}}
	home, err := netns.Current()
	check(t, err)
	c.home = home
	t.Cleanup(func() { check(t, redirect.Unpin(c.cfg.BPFFSDir), home.Close()) })
	return c
}

func (c *choice) choose(t *testing.T, kind string) (*redirector, error) {
	t.Helper()
	c.cfg.Redirect = kind
	c.log.Reset()
	r, err := choose(c.cfg, c.home, slog.New(slog.NewTextHandler(&c.log, nil)))
	if err == nil {
		t.Cleanup(r.close)
	}
	return r, err
}

// foreign attaches a program of somebody else's, as service translators do.
func foreign(t *testing.T, cgroup string) (detach func() error) {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "translator", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "Apache-2.0",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	check(t, err)
	defer p.Close()
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupInet4Connect, Program: p})
	check(t, err)
	t.Cleanup(func() { _ = l.Close() })
	return l.Close
}

func TestObstacles(t *testing.T) {
	c := newChoice(t)
	detach := foreign(t, c.cfg.CgroupRoot)
	r, err := c.choose(t, kindAuto)
	check(t, err)
	if r.kind != kindNFTables || !strings.Contains(r.reason, "translator") || r.hooks != nil {
		t.Errorf("beside a translator auto chose %s: %s", r.kind, r.reason)
	}
	if found, _, err := redirect.Pinned(c.cfg.BPFFSDir); found || err != nil {
		t.Errorf("programs stay that nobody uses: %t, %v", found, err)
	}
	// Who insists gets it, and is told.
	r, err = c.choose(t, kindEBPF)
	check(t, err)
	if s := r.nodeStatus(kindEBPF, nil); s.Redirector != kindEBPF || len(s.Obstacles) != 1 || !strings.Contains(s.Obstacles[0], "translator") {
		t.Errorf("status %+v does not name the translator", s)
	}
	if !strings.Contains(c.log.String(), "translator") {
		t.Errorf("the log does not name the translator: %s", c.log.String())
	}
	check(t, detach())
	r.verify()
	if s := r.nodeStatus(kindEBPF, nil); len(s.Obstacles) > 0 {
		t.Errorf("status %+v names what is gone", s)
	}
	// Programs of a pod may not be left to a lesser redirector without a word.
	check(t, netlab.Cable(c.pod, "eth0", c.pod, "eth1"), r.hooks.Apply(c.pod.NS, redirect.PodRules{}))
	r.close()
	check(t, redirect.Unpin(c.cfg.BPFFSDir))
	foreign(t, c.cfg.CgroupRoot)
	r, err = c.choose(t, kindEBPF)
	check(t, err, r.hooks.Apply(c.pod.NS, redirect.PodRules{}))
	r.close()
	r, err = c.choose(t, kindAuto)
	check(t, err)
	if r.kind != kindNFTables || r.hooks == nil || !strings.Contains(c.log.String(), "holds less") {
		t.Errorf("auto chose %s and said %s", r.kind, c.log.String())
	}
	// The programs go when the last pod has changed over.
	r.verify()
	if found, pods, _ := redirect.Pinned(c.cfg.BPFFSDir); !found || pods != 1 {
		t.Fatalf("programs are pinned: %t, of %d pods, want one's", found, pods)
	}
	rules := r.rules()
	if waiting, err := rules.(*redirect.Succession).Waiting(c.pod.NS); !waiting || err != nil {
		t.Errorf("the pod waits to change over: %t, %v", waiting, err)
	}
	check(t, rules.Apply(c.pod.NS, redirect.PodRules{}))
	r.verify()
	if found, _, err := redirect.Pinned(c.cfg.BPFFSDir); found || err != nil {
		t.Errorf("programs stay after all pods changed over: %t, %v", found, err)
	}
	check(t, rules.Check(c.pod.NS, redirect.PodRules{}), rules.Remove(c.pod.NS))
}

// State that cannot be opened is neither ignored nor joined by another redirector.
func TestStateThatCannotBeOpened(t *testing.T) {
	c := newChoice(t)
	r, err := c.choose(t, kindAuto)
	check(t, err)
	if r.kind != kindEBPF || r.reason == "" {
		t.Errorf("auto chose %s: %s", r.kind, r.reason)
	}
	check(t, netlab.Cable(c.pod, "eth0", c.pod, "eth1"), r.hooks.Apply(c.pod.NS, redirect.PodRules{}))
	r.close()
	root := c.cfg.CgroupRoot
	c.cfg.CgroupRoot = t.TempDir()
	for _, kind := range []string{kindAuto, kindNFTables, kindEBPF} {
		if _, err := c.choose(t, kind); err == nil || !strings.Contains(err.Error(), "not a cgroup2 directory") {
			t.Errorf("%s: %v, want a refusal to start", kind, err)
		}
	}
	c.cfg.CgroupRoot = root
	r, err = c.choose(t, kindAuto)
	check(t, err)
	if present, err := r.hooks.Present(c.pod.NS); !present || err != nil {
		t.Errorf("the pod's programs are there: %t, %v", present, err)
	}
}

func TestWhereProgramsArePinned(t *testing.T) {
	netlab.Require(t)
	dir := t.TempDir()
	err := makeBPFDir(filepath.Join(dir, "ambit"))
	if err == nil || !strings.Contains(err.Error(), "mount -t bpf bpffs "+dir) {
		t.Errorf("%v, want the command to mount %s", err, dir)
	}
	if _, err := os.Stat(filepath.Join(dir, "ambit")); err == nil {
		t.Error("a directory was made that is of no use")
	}
	fs := netlab.MustBPFFS(t)
	check(t, makeBPFDir(fs), makeBPFDir(filepath.Join(fs, "ambit")), makeBPFDir(filepath.Join(fs, "ambit")))
}
