package scenario

import (
	"time"

	"github.com/ambit-mesh/ambit/perf/load"
	"github.com/ambit-mesh/ambit/perf/topo"
)

// disturbed are loads beside which something else goes on. Those that leave the
// mesh with other processes, or with more to know, come last.
func disturbed() []Scenario {
	var out []Scenario
	add := func(set Set, name, title string, b topo.Beside, s load.Spec) *Scenario {
		out = append(out, Scenario{Name: string(topo.Cross) + "/" + name, Title: title, Placement: topo.Cross, Load: s, Set: set, Beside: b, Baseline: Baseline{There: true}})
		return &out[len(out)-1]
	}
	small := load.Spec{Kind: load.Rate, Conns: 4, Size: kib, PerSec: 500}
	add(Core, "mice-paced", "500 requests of 1 KiB per second at fixed times beside 100 MB/s on the same tunnels; baseline: alone", topo.Calf, small)
	add(Core, "mice-bulk", "500 requests of 1 KiB per second at fixed times beside a bulk flow on the same tunnels; baseline: alone", topo.Elephant, small)

	for _, n := range []struct {
		name         string
		attack, fair topo.Beside
		needs        Need
	}{
		{"connects", topo.AttackConnects, topo.Connects, Neighbours},
		{"refused", topo.AttackRefused, topo.Connects, Neighbours},
		{"streams", topo.AttackStreams, topo.Streams, Neighbours},
		{"handshakes", topo.AttackGreets, topo.Greets, ControlPlane},
	} {
		set := Core
		if n.name == "refused" {
			set = All
		}
		s := add(set, "noisy-"+n.name, "requests of 1 KiB, 8 connections, beside "+string(n.attack)+" of another pod; baseline: beside its "+string(n.fair),
			n.attack, load.Spec{Kind: load.Ask, Conns: 8, Size: kib})
		s.Baseline.Beside, s.Needs, s.AtLeast = n.fair, n.needs, time.Second // some answers take a tenth of it
	}

	s := add(Core, "enrol-100", "100 pods that run are taken into the mesh, then nothing: what each costs", topo.Enrolment,
		load.Spec{Kind: load.Enrol, Conns: 1, Size: 64, Total: topo.Pods})
	s.Needs, s.AtLeast, s.Once, s.Fresh, s.Baseline = ControlPlane, 30*time.Second, true, true, Baseline{}

	fresh := load.Spec{Kind: load.Connect, Conns: 16, Size: 64, PerSec: 500}
	s = add(Core, "churn-ask-16", "requests of 1 KiB, 16 connections, beside 50 changes of pods and policies per second; baseline: without", topo.Changes,
		load.Spec{Kind: load.Ask, Conns: 16, Size: kib})
	s.Needs = ControlPlane
	s = add(Core, "churn-connect", "500 connections per second at fixed times beside 50 changes of pods and policies per second; baseline: without", topo.Changes, fresh)
	s.Needs = ControlPlane
	s = add(Core, "effect", "from the declaration of a policy to the first connection decided by it, 1000 pods, 100 services, 50 other changes per second", topo.Toggles,
		load.Spec{Kind: load.Decide, Conns: 8, Size: 64, PerSec: 500})
	s.Needs, s.Crowd, s.AtLeast, s.Baseline = ControlPlane, topo.Crowd{Workloads: 1000, Services: 100}, 10*time.Second, Baseline{}
	s = add(All, "effect-10000", "the same with 10000 pods and 1000 services", topo.Toggles, load.Spec{Kind: load.Decide, Conns: 8, Size: 64, PerSec: 500})
	s.Needs, s.Crowd, s.AtLeast, s.Baseline = ControlPlane, topo.Crowd{Workloads: 10000, Services: 1000}, 10*time.Second, Baseline{}

	s = add(Core, "learn-10000", "10000 workloads and 1000 services become known to proxies that have just started, then nothing: what they cost", topo.Learning,
		load.Spec{Kind: load.Learn, Conns: 1, Size: 64, Total: topo.Workloads})
	s.Needs, s.AtLeast, s.Once, s.Baseline = ControlPlane, 30*time.Second, true, Baseline{}

	s = add(Core, "restart-connect", "500 connections per second at fixed times beside a rolling restart of both proxies; baseline: without", topo.Rollout, fresh)
	s.Needs, s.AtLeast, s.Once = Rollouts, 8*time.Second, true
	s = add(Core, "restart-rate", "500 requests of 1 KiB per second at fixed times on 16 connections that stay, beside a rolling restart of both proxies; baseline: without",
		topo.Rollout, load.Spec{Kind: load.Rate, Conns: 16, Size: kib, PerSec: 500})
	s.Needs, s.AtLeast, s.Once = Rollouts, 12*time.Second, true
	s = add(All, "arrival-70000", "500 connections per second at fixed times while 70000 workloads appear; baseline: without", topo.Arrival, fresh)
	s.Needs, s.AtLeast, s.Once = ControlPlane, 40*time.Second, true
	s = add(All, "reconnect-70000", "500 connections per second at fixed times while the control plane, which knows 70000 workloads, starts again; baseline: without",
		topo.Restart, fresh)
	s.Needs, s.Crowd, s.AtLeast, s.Once = ControlPlane, topo.Crowd{Workloads: 70000, Services: 1000}, 25*time.Second, true
	return out
}
