package load

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestChurnWritesAndTakesAway(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	donec := make(chan error, 1)
	go func() {
		donec <- Churn{Dir: dir, Name: "n", Workloads: 1500, Services: 10, PerSec: 2000, Deny: "ns", Every: 5 * time.Millisecond}.Run(ctx, w)
		_ = w.Close()
	}()
	lines := bufio.NewReader(r)
	if _, err := lines.ReadBytes('\n'); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, filePrefix+"n.crowd-*.yaml"))
	if err != nil || len(files) != 2 { // of 1000 and 511 objects
		t.Fatalf("%v, %v", files, err)
	}
	b, err := os.ReadFile(files[0])
	if err != nil || strings.Count(string(b), "kind: Pod") != 1000-11 || strings.Count(string(b), "kind: Service\n") != 10 {
		t.Errorf("%d pods, %v", strings.Count(string(b), "kind: Pod"), err)
	}
	for {
		changed, err := filepath.Glob(filepath.Join(dir, filePrefix+"n.p*.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		toggled, _ := filepath.Glob(filepath.Join(dir, filePrefix+"n.toggle.yaml")) // the pattern is sound, as above
		if len(changed) > 3 && len(toggled) == 1 {
			break
		}
	}
	cancel()
	var did Churned
	if err := json.NewDecoder(lines).Decode(&did); err != nil {
		t.Fatal(err)
	}
	if err := <-donec; err != nil {
		t.Fatal(err)
	}
	if did.Changes < 4 || len(did.Toggles) == 0 || did.Toggles[0].Allowed {
		t.Errorf("did %+v", did)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestEffectOf(t *testing.T) {
	at := func(ms int) time.Time { return time.Unix(1, 0).Add(time.Duration(ms) * time.Millisecond) }
	toggles := []Toggle{{at(100), false}, {at(200), true}, {at(300), false}, {at(400), true}}
	for _, tt := range []struct {
		name            string
		seen            []Decision
		until           int
		delays          uint64
		longest         time.Duration
		missed, against int
	}{
		{"one is missed", []Decision{{At: at(1), Served: true, Run: 9}, {At: at(107), Served: false, Run: 9}, {At: at(203), Served: true, Run: 9}, {At: at(403), Served: false, Run: 1}, {At: at(409), Served: true, Run: 9}}, 600, 3, 9 * time.Millisecond, 1, 0},
		{"the last was hardly seen", []Decision{{At: at(1), Served: true, Run: 9}, {At: at(107), Served: false, Run: 9}, {At: at(203), Served: true, Run: 9}, {At: at(305), Served: false, Run: 20}}, 450, 3, 7 * time.Millisecond, 0, 0},
		{"the last had its time", []Decision{{At: at(1), Served: true, Run: 9}, {At: at(107), Served: false, Run: 9}, {At: at(203), Served: true, Run: 9}, {At: at(305), Served: false, Run: 20}}, 500, 3, 7 * time.Millisecond, 1, 0},
		{"one of two proxies has the policy", []Decision{{At: at(1), Served: true, Run: 9}, {At: at(107), Served: false, Run: 3}, {At: at(120), Served: true, Run: 2}, {At: at(130), Served: false, Run: 4}, {At: at(140), Served: true, Run: 1}, {At: at(150), Served: false, Run: 4}, {At: at(203), Served: true, Run: 9}, {At: at(305), Served: false, Run: 9},
			{At: at(410), Served: true, Run: 9}}, 500, 4, 10 * time.Millisecond, 0, 3},
		{"two are decided at the same time", []Decision{{At: at(1), Served: true, Run: 9}, {At: at(107), Run: 1, Took: 5e6}, {At: at(110), Served: true, Run: 1}, {At: at(111), Run: 9},
			{At: at(203), Served: true, Run: 9}, {At: at(305), Run: 9}, {At: at(410), Served: true, Run: 9}}, 500, 4, 10 * time.Millisecond, 0, 0},
	} {
		e := EffectOf(toggles, tt.seen, at(tt.until))
		if e.Delays.Count() != tt.delays || e.Missed != tt.missed || e.Delays.Max() != uint64(tt.longest) || e.Against != tt.against {
			t.Errorf("%s: %d delays, longest %s, %d missed, %d against", tt.name, e.Delays.Count(), time.Duration(e.Delays.Max()), e.Missed, e.Against)
		}
	}
}

func TestRefused(t *testing.T) {
	dial := &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	reset := &net.OpError{Op: "read", Err: os.NewSyscallError("read", syscall.ECONNRESET)}
	soon := &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNRESET)} // established, and reset before connect looked
	for err, want := range map[error]bool{
		io.EOF: true, io.ErrUnexpectedEOF: true, reset: true, soon: true, dial: false, &net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}: false,
		&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}: false,
	} {
		if refused(err) != want {
			t.Errorf("%v: %t", err, !want)
		}
	}
}
