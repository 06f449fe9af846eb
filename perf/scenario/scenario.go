// Package scenario declares what is measured and measures it: each load over each
// mode in turn, round by round, so that what is compared ran next to each other.
package scenario

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/perf/load"
	"github.com/ambit-mesh/ambit/perf/report"
	"github.com/ambit-mesh/ambit/perf/topo"
)

// Set says how much is measured.
type Set int

// Sets; each contains those before it.
const (
	Quick Set = iota // under a minute with the built-in modes
	Core             // what the bars are about
	All              // every size and number of connections
)

// Scenario is a load between two pods. Of the load, times and addresses are set
// when it runs.
type Scenario struct {
	Name, Title string
	Placement   topo.Placement
	Load        load.Spec
	Set         Set

	Needs    Need
	Beside   topo.Beside   // what goes on meanwhile
	Baseline Baseline      // what it is compared with, in the same run
	Crowd    topo.Crowd    // what the control plane knows besides
	AtLeast  time.Duration // that a run takes, where less says nothing
	Once     bool          // it is no matter of chance, or takes long
	Fresh    bool          // the path's proxies are replaced before each run: memory tells of all that was before
}

// Baseline is the load that is measured before something goes on beside it.
type Baseline struct {
	There  bool
	Beside topo.Beside // what goes on beside the baseline; "": nothing
}

// Need is what a mode must have for a scenario to make sense.
type Need string

// Needs.
const (
	Encryption   Need = "TLS between nodes"
	ControlPlane Need = "a control plane"
	Neighbours   Need = "proxies that other pods use too"
	Rollouts     Need = "proxies of which two run at a time, on ports that can be set"
)

// lacks says why a path is left out of a scenario; "": it is not.
func (s Scenario) lacks(p topo.Path) string {
	proxied := slices.ContainsFunc(p.Watch, func(w load.Process) bool { return w.Proxy })
	has := true
	switch s.Needs {
	case Encryption:
		has = p.TLSServer != ""
	case ControlPlane:
		has = p.Meshed
	case Rollouts:
		has = p.Rolls
	case Neighbours: // no mesh at all is the control
		has = p.Meshed || !proxied
	}
	if has {
		return ""
	}
	return "it has no " + strings.TrimPrefix(string(s.Needs), "a ")
}

// described is the scenario in a report.
func (s Scenario) described() report.Scenario {
	s.Load.Beside = string(s.Beside)
	return report.Scenario{Name: s.Name, Title: s.Title, Placement: string(s.Placement), Load: s.Load}
}

const kib = 1 << 10

// Catalog lists all scenarios.
func Catalog() []Scenario {
	var out []Scenario
	for _, p := range []topo.Placement{topo.Cross, topo.Same} {
		add := func(set Set, name, title string, s load.Spec) {
			out = append(out, Scenario{Name: string(p) + "/" + name, Title: title, Placement: p, Load: s, Set: set})
		}
		cross := p == topo.Cross
		for _, kind := range []string{load.Up, load.Down} {
			for _, conns := range []int{1, 4, 16, 64} {
				for _, size := range []int{1, 16, 64, 256} {
					add(bulkSet(cross, kind, conns, size), fmt.Sprintf("%s-%dx%dk", kind, conns, size),
						fmt.Sprintf("%s, %s, %d KiB writes", map[string]string{load.Up: "bulk up", load.Down: "bulk down"}[kind], connections(conns), size),
						load.Spec{Kind: kind, Conns: conns, Size: size * kib})
				}
			}
		}
		for _, conns := range []int{1, 16, 64} {
			set := Core
			if conns == 1 || conns == 16 && cross {
				set = Quick
			}
			add(set, fmt.Sprintf("ask-%d", conns), fmt.Sprintf("request and response of 1 KiB, %s", connections(conns)), load.Spec{Kind: load.Ask, Conns: conns, Size: kib})
		}
		// Without a proxy in the path a placement of the scheduler's is all that an
		// unpinned figure shows.
		if set := Core; !cross {
			add(set, "ask-1-pinned", "request and response of 1 KiB, 1 connection, client and server on a CPU each", load.Spec{Kind: load.Ask, Conns: 1, Size: kib, Pinned: true})
			add(set, "bulk-up-1x64k-pinned", "bulk up, 1 connection, 64 KiB writes, client and server on a CPU each", load.Spec{Kind: load.Up, Conns: 1, Size: 64 * kib, Pinned: true})
		}
		for _, conns := range []int{1, 16} {
			set := Core
			if conns == 16 && cross {
				set = Quick
			}
			add(set, fmt.Sprintf("connect-%d", conns), fmt.Sprintf("connect, 64 B request and response, close, %d at a time", conns), load.Spec{Kind: load.Connect, Conns: conns, Size: 64})
		}
		for _, rate := range []int{500, 2000, 8000} {
			set := All
			if rate == 2000 {
				set = Core
				if cross {
					set = Quick
				}
			}
			add(set, fmt.Sprintf("rate-%d", rate), fmt.Sprintf("%d requests of 1 KiB per second at fixed times, 16 connections", rate),
				load.Spec{Kind: load.Rate, Conns: 16, Size: kib, PerSec: rate})
		}
		many := 10000
		if !cross {
			many = 5000 // both sides are in one proxy: as many sockets, which a limit of 20000 files has room for
		}
		for _, n := range []int{500, many} {
			set := All
			if n == 10000 {
				set = Core
			}
			add(set, fmt.Sprintf("idle-%d", n), fmt.Sprintf("%d idle connections", n), load.Spec{Kind: load.Idle, Conns: n, Size: 64})
			out[len(out)-1].Fresh = true
		}
	}
	return slices.Concat(out, hops(), mesh(), disturbed())
}

func bulkSet(cross bool, kind string, conns, size int) Set {
	switch {
	case kind == load.Up && conns == 1 && size == 64:
		return Quick
	case cross && kind == load.Up && conns == 16 && size == 64:
		return Quick
	case conns == 1 && size == 64, cross && kind == load.Up && (conns == 1 && size == 1 || conns == 64 && size == 64):
		return Core
	}
	return All
}

func connections(n int) string {
	if n == 1 {
		return "1 connection"
	}
	return fmt.Sprintf("%d connections", n)
}

// Select is the part of a catalog that belongs to a set and whose names match.
// With expressions the set does not matter.
func Select(all []Scenario, set Set, names []string) ([]Scenario, error) {
	var out []Scenario
	if len(names) == 0 {
		for _, s := range all {
			if s.Set <= set {
				out = append(out, s)
			}
		}
		return out, nil
	}
	seen := map[string]bool{}
	for _, name := range names {
		re, err := regexp.Compile(name)
		if err != nil {
			return nil, fmt.Errorf("scenario %q: %w", name, err)
		}
		found := false
		for _, s := range all {
			if re.MatchString(s.Name) {
				found = true
				if !seen[s.Name] {
					seen[s.Name] = true
					out = append(out, s)
				}
			}
		}
		if !found {
			return nil, fmt.Errorf("no scenario matches %q; ambit-perf list names them", name)
		}
	}
	return out, nil
}

// Defaults are a set's rounds and times.
func Defaults(set Set) (rounds int, warm, length time.Duration) {
	switch set {
	case Quick:
		return 2, 80 * time.Millisecond, 300 * time.Millisecond
	case Core:
		return 5, 300 * time.Millisecond, 1500 * time.Millisecond
	}
	return 3, 150 * time.Millisecond, 500 * time.Millisecond
}
