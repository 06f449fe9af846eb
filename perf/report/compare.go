package report

import (
	"fmt"
	"io"
)

// Compare writes what differs between two reports: medians of each, the change,
// and whether the middle halves of their runs lie apart. Figures of different days
// differ for many reasons; those of our modes divided by another mode's in the
// same run, which come first, say more.
func Compare(w io.Writer, a, b *Report) error {
	p := &printer{w: w}
	p.f("A  %s  %s\n   %s\nB  %s  %s\n   %s\n", a.Started.Format("2006-01-02 15:04"), a.Version, a.Settings, b.Started.Format("2006-01-02 15:04"), b.Version, b.Settings)
	if a.Machine.CPU != b.Machine.CPU || a.Machine.CPUs != b.Machine.CPUs || a.Machine.Kernel != b.Machine.Kernel {
		p.f("warning: the machines differ: %s, %d CPUs, %s; %s, %d CPUs, %s\n", a.Machine.CPU, a.Machine.CPUs, a.Machine.Kernel, b.Machine.CPU, b.Machine.CPUs, b.Machine.Kernel)
	}
	if a.Settings.AccessLog != b.Settings.AccessLog {
		p.f("warning: one wrote access logs, the other did not\n")
	}
	old := map[string]Group{}
	for _, g := range a.Groups() {
		old[g.Scenario.Name] = g
	}
	both := 0
	for _, g := range b.Groups() {
		was, ok := old[g.Scenario.Name]
		if !ok {
			continue
		}
		t := table{{"", "A", "B", "B/A", ""}}
		t = append(t, ratioLines(was, g)...)
		t = append(t, rowLines(was, g)...)
		if len(t) == 1 {
			continue
		}
		both++
		p.f("\n%s · %s  [%s]\n", g.Scenario.Title, g.Scenario.Placement, g.Scenario.Name)
		t.print(p)
	}
	if both == 0 && p.err == nil {
		return fmt.Errorf("compare reports: they have no scenario with a common mode")
	}
	return p.err
}

func ratioLines(a, b Group) (t table) {
	for _, x := range a.Pairs() {
		for _, y := range b.Pairs() {
			if x.Subject.Mode != y.Subject.Mode || x.Other.Mode != y.Other.Mode {
				continue
			}
			for _, m := range Metrics(b.Scenario.Load.Kind) {
				if m.Better != 0 {
					t = add(t, m, x.Subject.Mode+" / "+x.Other.Mode+" "+m.Name, Ratios(x.Subject, x.Other, m), Ratios(y.Subject, y.Other, m))
				}
			}
		}
	}
	return t
}

func rowLines(a, b Group) (t table) {
	for _, x := range a.Rows {
		for _, y := range b.Rows {
			if x.Mode != y.Mode {
				continue
			}
			for _, m := range Metrics(b.Scenario.Load.Kind) {
				if m.Better != 0 {
					t = add(t, m, x.Mode+" "+m.Unit, x.Values(m), y.Values(m))
				}
			}
		}
	}
	return t
}

func add(t table, m Metric, name string, a, b []float64) table {
	sa, sb := SpreadOf(a), SpreadOf(b)
	if sa.N == 0 || sb.N == 0 || sa.Median == 0 {
		return t
	}
	verdict := map[int]string{-1: "worse", +1: "better"}[Apart(sb, sa)*m.Better]
	return append(t, []string{name, sa.String(), sb.String(), fmt.Sprintf("%.2f", sb.Median/sa.Median), verdict})
}
