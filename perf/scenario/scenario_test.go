package scenario

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/perf/load"
	"github.com/ambit-mesh/ambit/perf/peer"
	"github.com/ambit-mesh/ambit/perf/report"
	"github.com/ambit-mesh/ambit/perf/topo"
)

func TestCatalogIsSound(t *testing.T) {
	seen := map[string]bool{}
	sets := map[Set]int{}
	for _, s := range Catalog() {
		if seen[s.Name] {
			t.Errorf("%s is there twice", s.Name)
		}
		seen[s.Name] = true
		sets[s.Set]++
		spec := s.Load
		spec.For = time.Second
		if s.Needs == Encryption {
			spec.Client = &load.Client{} // the lab has it
		}
		if err := spec.Validate(); err != nil {
			t.Errorf("%s: %v", s.Name, err)
		}
		if s.Title == "" || !strings.HasPrefix(s.Name, string(s.Placement)+"/") {
			t.Errorf("%s: title %q, placement %s", s.Name, s.Title, s.Placement)
		}
	}
	if sets[Quick] == 0 || sets[Core] == 0 || sets[All] == 0 {
		t.Errorf("sets have %v scenarios", sets)
	}
}

func TestSelect(t *testing.T) {
	all := []Scenario{{Name: "x/a", Set: Quick}, {Name: "x/b", Set: Core}, {Name: "y/b", Set: All}}
	tests := []struct {
		set   Set
		words []string
		want  string
		err   string
	}{
		{Quick, nil, "x/a", ""}, {Core, nil, "x/a x/b", ""}, {All, nil, "x/a x/b y/b", ""},
		{Quick, []string{"/b", "^y"}, "x/b y/b", ""},
		{All, []string{"/c"}, "", "no scenario matches"}, {All, []string{"("}, "", "scenario \"(\""},
	}
	for _, tt := range tests {
		got, err := Select(all, tt.set, tt.words)
		if (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%v: error %v, want %q", tt.words, err, tt.err)
			continue
		}
		var names []string
		for _, s := range got {
			names = append(names, s.Name)
		}
		if strings.Join(names, " ") != tt.want {
			t.Errorf("%d %v: %v, want %s", tt.set, tt.words, names, tt.want)
		}
	}
}

// network records runs and answers with what is prepared.
type network struct {
	runs   []string
	steal  map[int]bool // by number of the run
	failed map[string]error
	crowds []topo.Crowd
	fresh  map[string]error // by mode: what replacing its proxies ends with
}

func (n *network) Renew(_ context.Context, mode string, _ topo.Placement) error {
	n.runs = append(n.runs, "renew "+mode)
	return n.fresh[mode]
}

func (n *network) Path(mode string, p topo.Placement) (topo.Path, bool) {
	return topo.Config{Peers: map[string]topo.Peer{"zt": {Kind: peer.Ztunnel}}}.Planned(mode, p)
}

func (n *network) Run(ctx context.Context, p topo.Path, _ load.Spec) (load.Result, error) {
	i := len(n.runs)
	n.runs = append(n.runs, p.Mode)
	r := load.Result{Elapsed: time.Second, Ops: 10, Machine: load.Machine{CPUs: 2}}
	if n.steal[i] {
		r.Machine.Steal = 100 * time.Millisecond
	}
	return r, errors.Join(n.failed[p.Mode], ctx.Err())
}

func (n *network) Begin(_ context.Context, p topo.Path, b topo.Beside, _ time.Duration) (func(load.Result) (map[string]float64, error), error) {
	n.runs = append(n.runs, "begin "+string(b))
	return func(load.Result) (map[string]float64, error) {
		n.runs = append(n.runs, "end")
		return map[string]float64{load.FigureBeside: 1}, nil
	}, nil
}

func (n *network) Gather(_ context.Context, c topo.Crowd) error {
	n.crowds = append(n.crowds, c)
	return nil
}

func TestModesRunInTurn(t *testing.T) {
	n := &network{}
	r := Runner{Network: n, Modes: []string{"none", "tls", "ambit"}, Settings: report.Settings{Rounds: 3, MaxSteal: 0.01}}
	rows, err := r.Run(t.Context(), []Scenario{{Name: "s", Placement: topo.Cross, Load: load.Spec{Kind: load.Ask}}})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(n.runs, " "); got != "none tls ambit ambit tls none tls ambit none" {
		t.Errorf("order: %s", got)
	}
	for _, row := range rows {
		for i, run := range row.Runs {
			if run.Round != i+1 {
				t.Errorf("%s: round %d is at %d", row.Mode, run.Round, i)
			}
		}
	}
	if runs := rows[0].Runs; runs[0].Place != 1 || runs[1].Place != 3 || runs[2].Place != 3 {
		t.Errorf("none ran at %d, %d, %d", runs[0].Place, runs[1].Place, runs[2].Place)
	}
}

// What a run leaves behind, and being the first after a pause, must not meet the
// same mode more often than the others.
func TestEachModeIsAtEachPlaceEquallyOften(t *testing.T) {
	for n := 1; n < 9; n++ {
		rounds := n + n%2*n // 2n where n is odd
		if n == 1 {
			rounds = 2
		}
		places, after := map[[2]int]int{}, map[[2]int]int{}
		for round := range rounds {
			last := -1
			for k := range n {
				i := turn(k, round, n)
				places[[2]int{i, k}]++
				if last >= 0 {
					after[[2]int{last, i}]++
				}
				if back := turn(n-1-k, round^1, n); back != i {
					t.Errorf("%d modes, round %d: number %d is at place %d, and %d in the reverse", n, round, i, k, back)
				}
				last = i
			}
		}
		for i := range n {
			for k := range n {
				if places[[2]int{i, k}] != rounds/n {
					t.Errorf("of %d modes, number %d is %d times at place %d in %d rounds", n, i, places[[2]int{i, k}], k, rounds)
				}
				if i != k && after[[2]int{i, k}] != rounds/n {
					t.Errorf("of %d modes, number %d comes %d times after %d in %d rounds", n, k, after[[2]int{i, k}], i, rounds)
				}
			}
		}
	}
}

// A few rounds of each scenario are many of all.
func TestWhoIsFirstGoesOnFromOneScenarioToTheNext(t *testing.T) {
	n := &network{}
	r := Runner{Network: n, Modes: []string{"none", "relay", "tls", "ambit"}, Settings: report.Settings{Rounds: 2, MaxSteal: 1}}
	var all []Scenario
	for i := range 4 {
		all = append(all, Scenario{Name: fmt.Sprint(i), Placement: topo.Cross, Once: i == 1, Load: load.Spec{Kind: load.Ask}})
	}
	rows, err := r.Run(t.Context(), all)
	if err != nil {
		t.Fatal(err)
	}
	first := map[string]int{}
	for _, row := range rows {
		for _, run := range row.Runs {
			if run.Place == 1 {
				first[row.Mode]++
			}
		}
		if runs := row.Runs; len(runs) == 2 && runs[0].Place+runs[1].Place != 5 {
			t.Errorf("%s, %s: at %d, then at %d", row.Scenario.Name, row.Mode, runs[0].Place, runs[1].Place)
		}
	}
	for _, m := range r.Modes {
		if first[m] < 1 || first[m] > 2 {
			t.Errorf("first in their turn: %v", first)
		}
	}
}

func TestProxiesAreReplacedBeforeTheirMemoryIsMeasured(t *testing.T) {
	n := &network{fresh: map[string]error{"tls": errors.New("it does not end")}}
	r := Runner{Network: n, Modes: []string{"tls", "ambit"}, Settings: report.Settings{Rounds: 2}}
	rows, err := r.Run(t.Context(), []Scenario{{Name: "s", Placement: topo.Cross, Fresh: true, Load: load.Spec{Kind: load.Idle}}})
	if err != nil || strings.Join(n.runs, " ") != "renew tls renew ambit ambit" || !strings.Contains(rows[0].Runs[0].Failed, "it does not end") {
		t.Errorf("%s, %+v, %v", n.runs, rows, err)
	}
}

// Who asks for everything gets most of it once: one round of each size, more of what
// the bars are about.
func TestWhatOnlyAllHasIsMeasuredInFewerRounds(t *testing.T) {
	for rounds, want := range map[int]string{1: "x a", 3: "x x x a", 6: "x x x x x x a a"} {
		n := &network{}
		r := Runner{Network: n, Modes: []string{"none"}, Settings: report.Settings{Rounds: rounds, MaxSteal: 1}, Sparse: true}
		list := []Scenario{{Name: "x", Set: Core, Placement: topo.Cross, Load: load.Spec{Kind: load.Ask}}, {Name: "a", Set: All, Placement: topo.Cross, Load: load.Spec{Kind: load.Ask}}}
		rows, err := r.Run(t.Context(), list)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, row := range rows {
			for range row.Runs {
				got = append(got, row.Scenario.Name)
			}
		}
		if s := strings.Join(got, " "); s != want {
			t.Errorf("%d rounds: %s, want %s", rounds, s, want)
		}
	}
}

// What is left is what the rest was estimated at, by how the estimate has been right.
func TestTimeLeft(t *testing.T) {
	n := &network{}
	var left []time.Duration
	r := Runner{Network: n, Modes: []string{"none", "ambit"}, Settings: report.Settings{Rounds: 1, For: time.Second}, Progress: func(s Step) { left = append(left, s.Left) }}
	all := []Scenario{
		{Name: "short", Placement: topo.Cross, Load: load.Spec{Kind: load.Ask}},
		{Name: "long", Placement: topo.Cross, Load: load.Spec{Kind: load.Ask}, AtLeast: time.Minute},
	}
	want := r.Estimate(all)
	if _, err := r.Run(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	if left[0] < want*9/10 || left[0] > want*11/10 || len(left) != 8 || left[3] < left[0]/2 || left[7] != 0 {
		t.Errorf("left of %s: %s", want, left) // runs take no time here: it is by half at most that this shortens the rest
	}
}

func TestModesWithoutAPathAreLeftOut(t *testing.T) {
	n := &network{}
	r := Runner{Network: n, Modes: []string{topo.None, topo.Accelerated}, Settings: report.Settings{Rounds: 2}}
	rows, err := r.Run(t.Context(), []Scenario{{Name: "far", Placement: topo.Cross, Load: load.Spec{Kind: load.Idle}}, {Name: "near", Placement: topo.Same, Load: load.Spec{Kind: load.Up}}})
	if err != nil || len(rows) != 3 || len(n.runs) != 5 { // idle loads run once
		t.Errorf("%d rows of %d runs, %v", len(rows), len(n.runs), err)
	}
}

func TestStolenRunsAreRepeatedAndCounted(t *testing.T) {
	n := &network{steal: map[int]bool{0: true, 1: true, 3: true, 4: true, 5: true, 6: true}}
	var told []string
	r := Runner{Network: n, Modes: []string{"none"}, Settings: report.Settings{Rounds: 2, MaxSteal: 0.01},
		Progress: func(s Step) { told = append(told, fmt.Sprint(s.Done, s.Repeat, s.Run != nil)) }}
	rows, err := r.Run(t.Context(), []Scenario{{Name: "s", Placement: topo.Cross, Load: load.Spec{Kind: load.Ask}}})
	if err != nil {
		t.Fatal(err)
	}
	runs := rows[0].Runs
	if runs[0].Repeated != 2 || runs[0].Stolen || runs[1].Repeated != attempts-1 || !runs[1].Stolen || rows[0].Repeated() != 2+attempts-1 {
		t.Errorf("runs: %+v", runs)
	}
	if want := []string{"0 0 false", "0 1 false", "0 2 false", "1 2 true"}; !slices.Equal(told[:4], want) {
		t.Errorf("told %q, want %q", told[:4], want)
	}
}

func TestFailuresAreInTheReport(t *testing.T) {
	n := &network{failed: map[string]error{"tls": errors.New("no route")}}
	r := Runner{Network: n, Modes: []string{"none", "tls"}, Settings: report.Settings{Rounds: 1}}
	rows, err := r.Run(t.Context(), []Scenario{{Name: "s", Placement: topo.Cross, Load: load.Spec{Kind: load.Ask}}})
	if err != nil || rows[1].Runs[0].Failed != "no route" {
		t.Errorf("%+v, %v", rows, err)
	}
}

func TestWhatWasMeasuredSurvivesAnInterruption(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	n := &network{}
	r := Runner{Network: n, Modes: []string{"none", "tls"}, Settings: report.Settings{Rounds: 1}}
	r.Progress = func(s Step) {
		if s.Run != nil {
			cancel()
		}
	}
	rows, err := r.Run(ctx, []Scenario{{Name: "s", Placement: topo.Cross, Load: load.Spec{Kind: load.Ask}}})
	if !errors.Is(err, context.Canceled) || len(rows) != 1 || rows[0].Mode != "none" {
		t.Errorf("%+v, %v", rows, err)
	}
}

// Every kind of load that is to be measured has a scenario, and all that can go on
// beside one does.
func TestCatalogIsComplete(t *testing.T) {
	kinds, besides, needs := map[string]bool{}, map[topo.Beside]bool{}, map[Need]bool{}
	fixed := map[string]bool{}
	for _, s := range Catalog() {
		kinds[s.Load.Kind], besides[s.Beside], besides[s.Baseline.Beside], needs[s.Needs] = true, true, true, true
		if s.Load.PerSec > 0 {
			fixed[s.Load.Kind] = true
		}
		if s.Beside == "" && s.Baseline.There {
			t.Errorf("%s has a baseline and nothing beside it", s.Name)
		}
		if s.Beside.Neighbourly() != s.Baseline.Beside.Neighbourly() {
			t.Errorf("%s compares %q with %q", s.Name, s.Beside, s.Baseline.Beside)
		}
	}
	for _, k := range []string{load.Up, load.Down, load.Ask, load.Connect, load.Rate, load.Idle, load.Settle, load.HTTP, load.GRPC, load.GRPCStream, load.Decide, load.Handshake, load.Tunnel, load.Enrol, load.Learn} {
		if !kinds[k] {
			t.Errorf("no scenario for %s", k)
		}
	}
	for _, k := range []string{load.Rate, load.HTTP, load.GRPC, load.Connect} {
		if !fixed[k] {
			t.Errorf("no scenario for %s at a fixed rate", k)
		}
	}
	for _, b := range []topo.Beside{topo.Elephant, topo.Calf, topo.Connects, topo.Streams, topo.Greets, topo.AttackConnects, topo.AttackRefused, topo.AttackStreams,
		topo.AttackGreets, topo.Changes, topo.Toggles, topo.Rollout, topo.Restart, topo.Arrival, topo.Enrolment, topo.Learning} {
		if !besides[b] {
			t.Errorf("no scenario beside %s", b)
		}
	}
}

func TestModesInWhichAScenarioMakesNoSenseSayWhy(t *testing.T) {
	n := &network{}
	r := Runner{Network: n, Modes: []string{topo.None, topo.TLS, topo.Ambit, "zt"}, Settings: report.Settings{Rounds: 1}}
	for _, tt := range []struct {
		need Need
		out  string
	}{
		{"", ""}, {Encryption, "none"}, {ControlPlane, "none tls"}, {Neighbours, "tls"}, {Rollouts, "none tls zt"},
	} {
		rows, err := r.Run(t.Context(), []Scenario{{Name: "s", Placement: topo.Cross, Needs: tt.need, Load: load.Spec{Kind: load.Ask}}})
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, row := range rows {
			if (row.LeftOut == "") != (len(row.Runs) == 1) {
				t.Errorf("%s, %s: %d runs, left out %q", tt.need, row.Mode, len(row.Runs), row.LeftOut)
			}
			if row.LeftOut != "" {
				out = append(out, row.Mode)
			}
		}
		if got := strings.Join(out, " "); len(rows) != 4 || got != tt.out {
			t.Errorf("%q leaves out %s, want %s", tt.need, got, tt.out)
		}
	}
}

func TestWhatGoesOnBesideALoadComesAfterItsBaseline(t *testing.T) {
	n := &network{}
	r := Runner{Network: n, Modes: []string{topo.Ambit}, Settings: report.Settings{Rounds: 1}}
	s := Scenario{Name: "s", Placement: topo.Cross, Beside: topo.AttackConnects, Crowd: topo.Crowd{Workloads: 7}, Load: load.Spec{Kind: load.Ask}}
	s.Baseline.There, s.Baseline.Beside = true, topo.Connects
	rows, err := r.Run(t.Context(), []Scenario{s})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"begin " + string(topo.Connects), topo.Ambit, "end", "begin " + string(topo.AttackConnects), topo.Ambit, "end"}
	if !slices.Equal(n.runs, want) || !slices.Equal(n.crowds, []topo.Crowd{{Workloads: 7}}) {
		t.Errorf("%q beside %v, want %q", n.runs, n.crowds, want)
	}
	got := rows[0].Runs[0].Result
	if got.Baseline == nil || got.Baseline.Ops != 10 || got.Figures[load.FigureBeside] != 1 {
		t.Errorf("%+v", got)
	}
}

func TestBarsAreAboutWhatIsMeasured(t *testing.T) {
	for _, b := range report.Bars() {
		for _, name := range []string{b.Scenario, b.Than} {
			i := slices.IndexFunc(Catalog(), func(s Scenario) bool { return s.Name == name })
			if name == "" {
				continue
			}
			if i < 0 {
				t.Errorf("%s: there is no scenario %s", b.About, name)
				continue
			}
			s := Catalog()[i]
			if !slices.ContainsFunc(report.Metrics(s.Load.Kind), func(m report.Metric) bool { return m.Name == b.Metric }) {
				t.Errorf("%s: %s has no %s", b.About, name, b.Metric)
			}
			cfg := topo.Config{Peers: map[string]topo.Peer{"ztunnel": {Kind: peer.Ztunnel}}}
			for _, mode := range []string{b.Subject, b.Against} {
				if mode == "" {
					continue
				}
				if p, ok := cfg.Planned(mode, s.Placement); !ok || s.lacks(p) != "" {
					t.Errorf("%s: %s has no %s: %s", b.About, name, mode, s.lacks(p))
				}
			}
		}
		if (b.Least == 0) == (b.Most == 0) {
			t.Errorf("%s: at least %v, at most %v", b.About, b.Least, b.Most)
		}
	}
}
