//go:build interop

package interop

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// TestFigures measures both proxies in turn, in the same lab, so that a slow
// machine is slow for both. It says nothing about any other machine.
func TestFigures(t *testing.T) {
	if os.Getenv("AMBIT_INTEROP_FIGURES") == "" {
		t.Skip("AMBIT_INTEROP_FIGURES=1 measures; it takes three minutes and wants an idle machine")
	}
	l := up(t)
	world(t, l)
	const rounds = 3
	tests := []struct {
		name string
		args []string
		show func(f []Figure) string
	}{
		{"one connection, bulk", []string{"bulk", "-d", "2s"}, func(f []Figure) string {
			return fmt.Sprintf("%.2f Gb/s", median(f, func(f Figure) float64 { return f.Rate })*8/1e9)
		}},
		{"1 KiB question and answer, 1 connection", []string{"rr", "-d", "2s", "-n", "1"}, latency},
		{"1 KiB question and answer, 16 connections", []string{"rr", "-d", "2s", "-n", "16"}, latency},
		{"connections, 1 at a time", []string{"connects", "-d", "2s", "-n", "1"}, latency},
		{"connections, 8 at a time", []string{"connects", "-d", "2s", "-n", "8"}, latency},
	}
	steal, all := stolen(t)
	for _, tt := range tests {
		got := map[string][]Figure{}
		for range rounds {
			for _, r := range routes {
				var f Figure
				out := l.call(t, r.client(), append(tt.args, l.address(t, r.server(), 4))...)
				if err := json.Unmarshal([]byte(out), &f); err != nil {
					t.Fatalf("%s: %v", out, err)
				}
				got[r.name] = append(got[r.name], f)
			}
		}
		for _, r := range routes {
			results.set("figure: "+tt.name, r.name, tt.show(got[r.name]))
		}
	}
	stealNow, allNow := stolen(t)
	results.remark("figures: median of %d rounds in turn; steal %.1f %% meanwhile, load %s", rounds, 100*(stealNow-steal)/(allNow-all), strings.TrimSpace(string(read(t, "/proc/loadavg"))))
}

func latency(f []Figure) string {
	return fmt.Sprintf("%.0f/s p50 %.0f us p99 %.0f us", median(f, func(f Figure) float64 { return f.Rate }),
		median(f, func(f Figure) float64 { return f.P50 }), median(f, func(f Figure) float64 { return f.P99 }))
}

func median(f []Figure, of func(Figure) float64) float64 {
	var v []float64
	for _, one := range f {
		v = append(v, of(one))
	}
	slices.Sort(v)
	return v[len(v)/2]
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// stolen is the machine's time since its start that others had, and all of it.
func stolen(t *testing.T) (steal, all float64) {
	t.Helper()
	var user, nice, system, idle, iowait, irq, softirq float64
	if _, err := fmt.Sscanf(string(read(t, "/proc/stat")), "cpu %f %f %f %f %f %f %f %f", &user, &nice, &system, &idle, &iowait, &irq, &softirq, &steal); err != nil {
		t.Fatal(err)
	}
	return steal, user + nice + system + idle + iowait + irq + softirq + steal
}
