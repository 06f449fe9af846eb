package flow

import (
	"strings"
	"testing"
)

const (
	goodID     = "4bf92f3577b34da6a3ce929d0e0e4736"
	goodParent = "00-" + goodID + "-00f067aa0ba902b7-01"
)

func TestParseTraceParent(t *testing.T) {
	for _, c := range []struct {
		name, in string
		ok       bool
	}{
		{"the specification's example", goodParent, true},
		{"a later version", "cc" + goodParent[2:], true},
		{"a later version that says more", "cc" + goodParent[2:] + "-what-comes", true},
		{"no flags set", goodParent[:53] + "00", true},
		{"empty", "", false},
		{"short", goodParent[:54], false},
		{"version 00 says no more", goodParent + "-x", false},
		{"version ff", "ff" + goodParent[2:], false},
		{"a later version with glued text", "cc" + goodParent[2:] + "x", false},
		{"a later version without bound", "cc" + goodParent[2:] + "-" + strings.Repeat("x", 1000), false},
		{"upper case", strings.ToUpper(goodParent), false},
		{"not hex", "00-" + strings.Repeat("g", 32) + "-00f067aa0ba902b7-01", false},
		{"trace id of zeros", "00-" + strings.Repeat("0", 32) + "-00f067aa0ba902b7-01", false},
		{"parent id of zeros", "00-" + goodID + "-0000000000000000-01", false},
		{"wrong separator", strings.ReplaceAll(goodParent, "-", "_"), false},
		{"55 bytes of anything", strings.Repeat("\n", 55), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			tr, ok := ParseTraceParent(c.in)
			if ok != c.ok || ok != (tr.String() == goodID) {
				t.Errorf("%q: %v, id %q", c.in, ok, tr)
			}
		})
	}
}

// TestBothSidesLogOneID: what the source sends is what the destination logs.
func TestBothSidesLogOneID(t *testing.T) {
	table := New(Config{})
	out, _ := table.Begin(t.Context(), Record{Direction: Outbound})
	in, _ := table.Begin(t.Context(), Record{Direction: Inbound})
	defer out.End(nil)
	defer in.End(nil)
	if out.trace.ID == in.trace.ID {
		t.Fatal("ids are not random")
	}
	in.Join(out.TraceParent())
	if out.trace.String() != in.trace.String() {
		t.Errorf("source %s, destination %s", out.trace, in.trace)
	}
	if out.TraceParent() == in.TraceParent() {
		t.Error("the next hop's parent is this proxy's part, not the source's")
	}
	was := in.trace
	in.Join("00-nonsense")
	if in.trace != was {
		t.Error("a malformed header changed the trace")
	}
}

func FuzzTraceParent(f *testing.F) {
	for _, s := range []string{goodParent, "cc" + goodParent[2:] + "-x", "", "00-", strings.Repeat("-", 55)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		tr, ok := ParseTraceParent(s)
		if !ok {
			if !tr.IsZero() {
				t.Fatalf("%q is refused and yet %s", s, tr)
			}
			return
		}
		again, ok := ParseTraceParent(tr.Header())
		if !ok || again != tr || !strings.Contains(s, tr.String()) {
			t.Fatalf("%q gives %s, and that %s", s, tr.Header(), again)
		}
	})
}
