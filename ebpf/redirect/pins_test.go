package redirect_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
	"net/netip"
)

func TestHooksSurviveTheirProcess(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	s.enrol(t)
	s.wantCaptured(t, "enrolled")
	check(t, s.hooks.Close())
	s.wantCaptured(t, "with nobody there")
	s.open(t)
	if s.hooks.Rebuilt() {
		t.Error("state of the same layout was rebuilt")
	}
	s.wantCaptured(t, "taken over")
	if have, err := s.hooks.Present(s.pod.NS); err != nil || !have {
		t.Errorf("present is %v, %v after a restart", have, err)
	}
	s.enrol(t)
	s.wantCaptured(t, "applied again")
}

// TestHooksUpgradeUnderTraffic replaces all programs while connections are opened.
func TestHooksUpgradeUnderTraffic(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	s.enrol(t)
	stop, donec, rounds := make(chan struct{}), make(chan struct{}), make(chan struct{}, 1000)
	go func() {
		for {
			select {
			case <-stop:
				close(donec)
				return
			default:
			}
			s.wantCaptured(t, "while programs are replaced")
			select {
			case rounds <- struct{}{}:
			default:
			}
		}
	}()
	for range 4 {
		<-rounds
		check(t, s.hooks.Close())
		s.open(t)
		s.enrol(t)
	}
	close(stop)
	<-donec
	drops, err := s.hooks.Drops()
	check(t, err)
	for reason, n := range drops {
		if n != 0 {
			t.Errorf("%d drops for %s", n, reason)
		}
	}
}

// TestHooksRebuild finds state of another layout, and a start that died half way.
func TestHooksRebuild(t *testing.T) {
	for _, tc := range []struct {
		name  string
		spoil func(dir string) error
	}{
		{"a map is missing", func(dir string) error { return os.Remove(filepath.Join(dir, "maps/mesh_enrolled")) }},
		{"a map is another", func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "maps/mesh_enrolled")),
				os.Rename(filepath.Join(dir, "maps/mesh_dials"), filepath.Join(dir, "maps/mesh_enrolled")))
		}},
		{"half done", func(dir string) error { return os.Mkdir(filepath.Join(dir, "maps-next"), 0o700) }},
		{"all maps are missing", func(dir string) error { return os.RemoveAll(filepath.Join(dir, "maps")) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newStage(t)
			stop := s.listenAll(t)
			s.enrol(t)
			check(t, s.hooks.Close(), tc.spoil(s.cfg.Dir))
			s.open(t)
			if !s.hooks.Rebuilt() {
				t.Fatal("an unknown layout was taken for a known one")
			}
			noPlaintext := func(when string) {
				t.Helper()
				c, err := connect(s.app, s.pod.NS, netip.MustParseAddrPort("10.9.0.2:8080"), nil)
				if err == nil && !strings.HasPrefix(c.line, "15001 ") {
					t.Errorf("%s: answered %q", when, c.line)
				}
				c, err = connect(s.app, s.client.NS, netip.MustParseAddrPort("10.8.0.2:8080"), nil)
				if err == nil && !strings.HasPrefix(c.line, "15006 ") {
					t.Errorf("%s: answered %q", when, c.line)
				}
			}
			// The pod's old gate would stop the SYN too, but the app is told at once.
			if c, err := connect(s.app, s.pod.NS, netip.MustParseAddrPort("10.9.0.2:8080"), nil); !errors.Is(err, unix.EPERM) {
				t.Errorf("on hold: answered %q, %v, want EPERM", c.line, err)
			}
			if drops, err := s.hooks.Drops(); err != nil || drops["hold"] != 1 {
				t.Errorf("drops are %v, %v, want one for hold", drops, err)
			}
			if c, err := connect(s.app, s.pod.NS, netip.MustParseAddrPort("127.0.0.1:8080"), nil); err != nil || !strings.HasPrefix(c.line, "app ") {
				t.Errorf("on hold, to itself: answered %q, %v", c.line, err)
			}
			noPlaintext("before the pod is applied")
			s.enrol(t)
			noPlaintext("before ready")
			check(t, s.hooks.Ready())
			noPlaintext("ready")
			// The proxy listens again.
			stop()
			s.listenProxy(t)
			s.wantCaptured(t, "with the proxy back")
		})
	}
}

func TestHooksPrune(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	s.enrol(t)
	gone, err := netlab.New("gone", "")
	check(t, err, s.hooks.Apply(gone.NS, redirect.PodRules{}))
	former := filepath.Join(filepath.Dir(s.proxy.Path), "former")
	check(t, os.Mkdir(former, 0o755), s.hooks.Proxy(former))
	pins := func() int {
		n := 0
		for _, dir := range []string{"pods", "proxy"} {
			dirs, err := os.ReadDir(filepath.Join(s.cfg.Dir, dir))
			check(t, err)
			n += len(dirs)
		}
		return n
	}
	check(t, s.hooks.Prune())
	if n := pins(); n != 4 {
		t.Fatalf("%d pods and proxies are pinned, want 4", n)
	}
	gone.Close()
	check(t, os.Remove(former))
	// The kernel takes namespaces away in its own time.
	for deadline := time.Now().Add(60 * time.Second); pins() != 2; {
		check(t, s.hooks.Prune())
		if time.Now().After(deadline) {
			t.Fatal("a pod without namespace or a proxy without cgroup is still pinned")
		}
		runtime.Gosched()
	}
	check(t, s.hooks.Check(s.pod.NS, everything))
	s.wantCaptured(t, "after another pod was forgotten")
}
