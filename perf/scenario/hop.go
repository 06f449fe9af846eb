package scenario

import (
	"fmt"

	"github.com/ambit-mesh/ambit/perf/load"
	"github.com/ambit-mesh/ambit/perf/topo"
)

// hops are loads over one HTTP proxy: at saturation, and at rates that each of them
// can do, where what it costs is compared.
func hops() []Scenario {
	const size = 1 * kib
	at := func(set Set, name, title string, s load.Spec) Scenario {
		s.Kind, s.Size = load.HTTP, size
		return Scenario{Name: string(topo.Hop1) + "/" + name, Title: title, Placement: topo.Hop1, Load: s, Set: set}
	}
	var out []Scenario
	for _, conns := range []int{1, 16, 64} {
		set := Core
		if conns == 64 {
			set = All
		}
		out = append(out, at(set, fmt.Sprintf("http-%d", conns), fmt.Sprintf("HTTP requests and responses of 1 KiB, %s", connections(conns)), load.Spec{Conns: conns}))
	}
	for _, rate := range []int{1000, 5000} {
		set := Core
		if rate == 5000 {
			set = All
		}
		out = append(out, at(set, fmt.Sprintf("http-rate-%d", rate), fmt.Sprintf("%d HTTP requests of 1 KiB per second at fixed times, 16 connections", rate), load.Spec{Conns: 16, PerSec: rate}))
	}
	return out
}
