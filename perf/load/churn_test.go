package load

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
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

func TestDelays(t *testing.T) {
	at := func(ms int) time.Time { return time.Unix(1, 0).Add(time.Duration(ms) * time.Millisecond) }
	toggles := []Toggle{{at(100), false}, {at(200), true}, {at(300), false}, {at(400), true}}
	seen := []Decision{{at(1), true}, {at(107), false}, {at(203), true}, {at(403), false}, {at(409), true}}
	h, missed := Delays(toggles, seen)
	if h.Count() != 3 || missed != 1 || h.Max() != uint64(9*time.Millisecond) {
		t.Errorf("%d delays, longest %s, %d missed", h.Count(), time.Duration(h.Max()), missed)
	}
}
