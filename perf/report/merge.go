package report

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
)

// Merge puts reports of the same programs on the same machine together: scenarios
// that were measured in several invocations, and rounds of the same ones.
func Merge(reports ...*Report) (*Report, error) {
	if len(reports) == 0 {
		return nil, fmt.Errorf("merge reports: there are none")
	}
	out := *reports[0]
	out.Rows, out.Paths, out.Command = slices.Clone(out.Rows), slices.Clone(out.Paths), slices.Clone(out.Command)
	for _, r := range reports[1:] {
		if r.Version != out.Version || r.Machine.CPU != out.Machine.CPU || r.Machine.CPUs != out.Machine.CPUs || r.Machine.Kernel != out.Machine.Kernel {
			return nil, fmt.Errorf("merge reports: %s on %s, and %s on %s: want the same program on the same machine", out.Version, out.Machine.CPU, r.Version, r.Machine.CPU)
		}
		if r.Settings.AccessLog != out.Settings.AccessLog || r.Settings.Profiled != out.Settings.Profiled || !slices.Equal(r.Settings.Env, out.Settings.Env) {
			return nil, fmt.Errorf("merge reports: the settings of proxies differ: %s; %s", out.Settings, r.Settings)
		}
		last := map[string]int{} // by scenario: rounds that modes have in common stay so
		for _, row := range out.Rows {
			for _, run := range row.Runs {
				last[row.Scenario.Name] = max(last[row.Scenario.Name], run.Round)
			}
		}
		for _, row := range r.Rows {
			row.renumber(last[row.Scenario.Name])
			i := slices.IndexFunc(out.Rows, func(o Row) bool { return o.Scenario.Name == row.Scenario.Name && o.Mode == row.Mode })
			if i < 0 {
				out.Rows = append(out.Rows, row)
				continue
			}
			if !reflect.DeepEqual(out.Rows[i].Scenario, row.Scenario) {
				return nil, fmt.Errorf("merge reports: %s differs: %+v, and %+v", row.Scenario.Name, out.Rows[i].Scenario, row.Scenario)
			}
			out.Rows[i].add(row)
		}
		for _, p := range r.Paths {
			if !slices.ContainsFunc(out.Paths, func(o Path) bool { return o.Mode == p.Mode && o.Placement == p.Placement }) {
				out.Paths = append(out.Paths, p)
			}
		}
		out.Settings.Rounds = max(out.Settings.Rounds, r.Settings.Rounds)
		out.Machine.LoadAvg = max(out.Machine.LoadAvg, r.Machine.LoadAvg)
		out.Took += r.Took
		out.Stopped = cmp.Or(out.Stopped, r.Stopped)
		out.Command = append(append(out.Command, ";"), r.Command...)
	}
	return &out, nil
}

// renumber makes its runs those of later rounds.
func (r *Row) renumber(by int) {
	r.Runs = slices.Clone(r.Runs)
	for i := range r.Runs {
		r.Runs[i].Round += by
	}
}

// add appends another report's runs.
func (r *Row) add(o Row) {
	r.Runs = slices.Concat(r.Runs, o.Runs)
	if r.Counted == nil {
		r.Counted = o.Counted
	}
	if len(r.Runs) > 0 {
		r.LeftOut = ""
	}
}
