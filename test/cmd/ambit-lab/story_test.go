package main

import (
	"bytes"
	"strings"
	"testing"
)

// A failed call of curl is two lines, its error and the status 000, and one call.
func TestCallsAreCountedByTheirStatus(t *testing.T) {
	for _, tc := range []struct {
		text        string
		all, failed int
	}{
		{"", 0, 0},
		{"200\n", 0, 0}, // the one that was interrupted
		{"200\n200\n200\n", 2, 0},
		{"200\ncurl: (56) Recv failure: Connection reset by peer\n000\n200\n200\n", 3, 1},
		{"curl: (52) Empty reply from server\n200\n503\n000\n200", 3, 2},
	} {
		b := &background{out: *bytes.NewBufferString(tc.text)}
		if all, failed := b.calls(); all != tc.all || failed != tc.failed {
			t.Errorf("%q: %d calls, %d failed; want %d, %d", tc.text, all, failed, tc.all, tc.failed)
		}
	}
}

// What did not hold is said once more at the end, where it is read.
func TestTheEndNamesWhatDidNotHold(t *testing.T) {
	var out strings.Builder
	s := &story{out: &out}
	s.chapter("One")
	s.check(true, "this holds")
	s.chapter("Two")
	s.check(false, "100%% of %s", "that")
	if code := s.end(); code != 1 {
		t.Errorf("exit status %d, want 1", code)
	}
	if want := "not so in chapter 2: 100% of that\ndemo: 1 checks passed, 1 failed\n"; !strings.HasSuffix(out.String(), want) {
		t.Errorf("the end is %q, want %q", out.String(), want)
	}
}
