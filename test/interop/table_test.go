//go:build interop

package interop

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"text/tabwriter"
)

// table collects what came of each case in each direction.
type table struct {
	mu    sync.Mutex
	names []string                     // in the order of their first row; guarded by mu
	cells map[string]map[string]string // guarded by mu
	notes []string                     // guarded by mu
}

var results = &table{cells: map[string]map[string]string{}}

func (r *table) set(name, column, cell string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cells[name] == nil {
		r.names = append(r.names, name)
		r.cells[name] = map[string]string{}
	}
	r.cells[name][column] = cell
}

// remark adds a line below the table.
func (r *table) remark(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

func (r *table) print(w io.Writer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprint(t, "\nCASE")
	for _, c := range routes {
		fmt.Fprintf(t, "\t%s", c.name)
	}
	fmt.Fprintln(t)
	for _, n := range r.names {
		fmt.Fprint(t, n)
		for _, c := range routes {
			fmt.Fprintf(t, "\t%s", cmp.Or(r.cells[n][c.name], "-"))
		}
		fmt.Fprintln(t)
	}
	_ = t.Flush() // standard output
	for _, n := range r.notes {
		fmt.Fprintln(w, n)
	}
}

// each runs a case in the directions given, all of them when none is, one after
// the other, and files the result. The case returns a note or "".
func each(t *testing.T, name string, run func(t *testing.T, r route) string, only ...string) {
	t.Helper()
	for _, r := range routes {
		if len(only) > 0 && !slices.Contains(only, r.name) {
			continue
		}
		t.Run(name+"/"+r.name, func(t *testing.T) {
			note := ""
			defer func() { results.set(name, r.name, outcome(t, note)) }()
			note = run(t, r)
		})
	}
}

func outcome(t *testing.T, note string) string {
	switch {
	case t.Failed():
		return "FAIL"
	case t.Skipped():
		return "skipped"
	case note != "":
		return "ok: " + note
	default:
		return "ok"
	}
}
