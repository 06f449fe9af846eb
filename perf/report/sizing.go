package report

import (
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/perf/load"
)

// Node is what a node proxy has to do, at most.
type Node struct {
	Pods        int     `json:"pods"`        // enrolled ones on it
	Connections int     `json:"connections"` // open at a time
	Connects    int     `json:"connects"`    // per second
	GB          float64 `json:"gb"`          // per second
	Requests    int     `json:"requests"`    // per second, on open connections
	Workloads   int     `json:"workloads"`   // known: of the whole mesh
}

// Validate says what of it cannot be.
func (n Node) Validate() error {
	for _, v := range []struct {
		name  string
		value float64
	}{{"pods", float64(n.Pods)}, {"connections", float64(n.Connections)}, {"connects", float64(n.Connects)}, {"gb", n.GB}, {"requests", float64(n.Requests)}, {"workloads", float64(n.Workloads)}} {
		if !(v.value >= 0 && v.value <= 1e9) {
			return fmt.Errorf("--%s %v: want 0 or more, up to 1e9", v.name, v.value)
		}
	}
	return nil
}

// ExampleNode is one that is neither small nor busy.
var ExampleNode = Node{Pods: 50, Connections: 2000, Connects: 100, GB: 0.1, Requests: 2000, Workloads: 10000}

// Cost is what one of something takes of a node proxy.
type Cost struct {
	Name   string  `json:"name"`
	Memory float64 `json:"memory,omitempty"` // bytes
	CPU    float64 `json:"cpu,omitempty"`    // of a second per second
	Node   float64 `json:"-"`                // how many a Node has
	From   string  `json:"from,omitempty"`   // the scenario
	Absent string  `json:"absent,omitempty"` // why there is no figure
	Agent  bool    `json:"agent,omitempty"`  // of the node's agent, not of the proxy
}

// Sizing is what follows from a report for a node.
type Sizing struct {
	Mode   string  `json:"mode"`
	Node   Node    `json:"node"`
	Costs  []Cost  `json:"costs"`
	CPU    float64 `json:"cpu"`    // request, cores
	Memory float64 `json:"memory"` // request, bytes
	Limit  float64 `json:"limit"`  // of memory, bytes
}

// SizingOf computes it. A figure is that of the proxy that needs most of the two
// which a path has; what was not measured is not guessed.
func (r *Report) SizingOf(mode string, n Node) Sizing {
	s := Sizing{Mode: mode, Node: n}
	idle := func(of func(load.Result, load.Usage) float64) func(load.Result) float64 {
		return func(res load.Result) float64 { return most(res, of) }
	}
	perOp := func(res load.Result) float64 {
		return most(res, func(_ load.Result, u load.Usage) float64 { return u.CPU.Seconds() / float64(max(res.Ops, 1)) })
	}
	s.memory(r, "the proxy itself", 1, idle(func(_ load.Result, u load.Usage) float64 { return float64(u.RSS) - float64(u.Grown) }), "cross-node/idle-10000", "cross-node/idle-500")
	const enrol = "cross-node/enrol-100"
	s.memory(r, "an enrolled pod", float64(n.Pods), idle(func(res load.Result, u load.Usage) float64 { return float64(u.Grown) / float64(max(res.Ops, 1)) }), enrol)
	s.memory(r, "an enrolled pod, of the agent", float64(n.Pods), func(res load.Result) float64 {
		v, _ := agents(res, grown)
		return v / float64(max(res.Ops, 1))
	}, enrol)
	s.Costs[len(s.Costs)-1].Agent = true
	s.memory(r, "an open connection", float64(n.Connections), idle(func(res load.Result, u load.Usage) float64 { return float64(u.Grown) / float64(max(res.Ops, 1)) }), "cross-node/idle-10000", "cross-node/idle-500")
	s.cpu(r, "a new connection per second", float64(n.Connects), perOp, "cross-node/connect-16", "cross-node/connect-1")
	s.cpu(r, "a GB per second", n.GB, func(res load.Result) float64 {
		return most(res, func(_ load.Result, u load.Usage) float64 { return u.CPU.Seconds() / max(float64(res.Bytes)/1e9, 1e-9) })
	}, "cross-node/bulk-up-1x64k", "cross-node/bulk-up-16x64k")
	s.cpu(r, "1000 requests per second", float64(n.Requests)/1000, func(res load.Result) float64 { return 1000 * perOp(res) }, "cross-node/rate-2000", "cross-node/ask-16", "cross-node/ask-1")
	s.known(r)
	var cpu, memory float64
	for _, c := range s.Costs {
		if c.Agent {
			continue
		}
		cpu += c.CPU * c.Node
		memory += c.Memory * c.Node
	}
	const mib = 1 << 20
	s.CPU = math.Ceil(cpu*100) / 100
	s.Memory = math.Ceil(memory/(16*mib)) * 16 * mib
	s.Limit = 2 * s.Memory
	return s
}

func (s *Sizing) memory(r *Report, name string, n float64, of func(load.Result) float64, from ...string) {
	c := r.cost(s.Mode, name, n, of, from)
	c.Memory, c.CPU = c.CPU, 0
	s.Costs = append(s.Costs, c)
}

func (s *Sizing) cpu(r *Report, name string, n float64, of func(load.Result) float64, from ...string) {
	s.Costs = append(s.Costs, r.cost(s.Mode, name, n, of, from))
}

// cost is the median of a figure in the first of some scenarios that has it.
func (r *Report) cost(mode, name string, n float64, of func(load.Result) float64, from []string) Cost {
	c := Cost{Name: name, Node: n}
	for _, scenario := range from {
		row, why := r.row(scenario, mode)
		if why != "" {
			continue
		}
		values := row.Values(Metric{Of: func(_ load.Spec, res load.Result) (float64, bool) {
			v := of(res)
			return v, v > 0
		}})
		if s := SpreadOf(values); s.N > 0 {
			c.CPU, c.From = s.Median, scenario
			return c
		}
	}
	c.Absent = "wants " + from[0]
	return c
}

// known is what proxies that have just started need more when a mesh becomes known
// to them, or the difference between two sizes of the mesh, each with the same load.
func (s *Sizing) known(r *Report) {
	const small, large, learn = "cross-node/effect", "cross-node/effect-10000", "cross-node/learn-10000"
	c := r.cost(s.Mode, "10000 known workloads, 1000 services", float64(s.Node.Workloads)/10000, func(res load.Result) float64 {
		return most(res, func(_ load.Result, u load.Usage) float64 { return float64(u.Grown) })
	}, []string{learn})
	if c.Absent == "" {
		c.Memory, c.CPU = c.CPU, 0
		s.Costs = append(s.Costs, c)
		return
	}
	c = Cost{Name: "10000 known workloads, 1000 services", Node: float64(s.Node.Workloads) / 10000}
	of := func(res load.Result) float64 {
		return most(res, func(_ load.Result, u load.Usage) float64 { return float64(u.RSS) })
	}
	few, many := r.cost(s.Mode, "", 0, of, []string{small}), r.cost(s.Mode, "", 0, of, []string{large})
	switch {
	case few.Absent != "" || many.Absent != "":
		c.Absent = "wants " + learn
	case many.CPU <= few.CPU:
		c.Absent = "not told from noise"
	default:
		c.Memory, c.From = (many.CPU-few.CPU)/0.9, large+" − "+small // 9000 workloads more
	}
	s.Costs = append(s.Costs, c)
}

// most is the largest of a figure among the proxies.
func most(r load.Result, of func(load.Result, load.Usage) float64) (out float64) {
	for _, u := range r.Usage {
		if u.Proxy {
			out = max(out, of(r, u))
		}
	}
	return out
}

// Measured reports whether enough is in it to go by: the proxy itself, at least.
func (s Sizing) Measured() bool { return s.Costs[0].From != "" }

func (s Sizing) lines() table {
	t := table{{"of a node proxy", "memory", "CPU", "here", "memory", "CPU", "from"}}
	for _, c := range s.Costs {
		_, from, _ := strings.Cut(c.From, "/")
		line := []string{c.Name, "–", "–", figure(c.Node), "–", "–", from}
		if c.Absent != "" {
			line[6] = c.Absent // what it wants
		}
		if c.Memory > 0 {
			line[1], line[4] = size(c.Memory), size(c.Memory*c.Node)
		}
		if c.CPU > 0 {
			line[2], line[5] = cores(c.CPU), cores(c.CPU*c.Node)
		}
		t = append(t, line)
	}
	return t
}

// follows says what to write into a pod's resources.
func (s Sizing) follows() string {
	missing := ""
	for _, c := range s.Costs {
		if c.Absent != "" && !c.Agent {
			if missing != "" {
				missing += ", "
			}
			missing += c.Name
		}
	}
	out := fmt.Sprintf("requests: cpu %.0fm, memory %.0fMi; limits: memory %.0fMi, twice the request, for garbage between collections and for bursts; no CPU limit: it would stop every pod of the node at once",
		1000*s.CPU, s.Memory/(1<<20), s.Limit/(1<<20))
	if missing != "" {
		out += ". Not in it, because not measured: " + missing
	}
	return out
}

// Text writes the table and what follows.
func (s Sizing) Text(w io.Writer) error {
	p := &printer{w: w}
	p.f("%s, one end of each connection\n", s.Mode)
	s.lines().print(p)
	p.f("%s.\n", s.follows())
	return p.err
}

func size(bytes float64) string {
	switch {
	case bytes >= 1<<20:
		return figure(bytes/(1<<20)) + " MiB"
	case bytes >= 1<<10:
		return figure(bytes/(1<<10)) + " KiB"
	}
	return figure(bytes) + " B"
}

func cores(seconds float64) string {
	if seconds < 0.001 {
		return (time.Duration(seconds * 1e9)).Round(100 * time.Nanosecond).String()
	}
	return figure(1000*seconds) + "m"
}
