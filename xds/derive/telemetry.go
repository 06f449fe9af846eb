package derive

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/crd"
)

// accessLog is which connections get a line.
type accessLog = ambit.WorkloadExtension_AccessLog

const (
	logAll      = ambit.WorkloadExtension_ACCESS_LOG_ALL
	logFailures = ambit.WorkloadExtension_ACCESS_LOG_FAILURES
	logOff      = ambit.WorkloadExtension_ACCESS_LOG_OFF
)

// telemetries are the Telemetry objects and which of them hold where.
type telemetries struct {
	all       map[nn]*crd.Telemetry
	selectors *selectorIndex
	wide      map[string]map[nn]*crd.Telemetry // without selector, by namespace
	dirty     set[nn]
}

func newTelemetries() telemetries {
	return telemetries{
		all: map[nn]*crd.Telemetry{}, selectors: newSelectorIndex(),
		wide: map[string]map[nn]*crd.Telemetry{}, dirty: set[nn]{},
	}
}

// logs reports whether a Telemetry says something about access logs of workloads.
// Objects that differ in what they are about do not compete.
func logs(t *crd.Telemetry) bool {
	return t != nil && len(t.Spec.AccessLogging) > 0 && !targetsWaypoint(t)
}

func targetsWaypoint(t *crd.Telemetry) bool {
	return t.Spec.TargetRef != nil || len(t.Spec.TargetRefs) > 0
}

func (e *Engine) inputTelemetry(k nn, t *crd.Telemetry) {
	before, beforeMesh := e.inheritedLog(k.ns), e.meshLog()
	was := put(e.tel.all, k, t)
	e.tel.dirty[k] = struct{}{}
	if logs(was) {
		if sel := was.Spec.Selector.Labels(); len(sel) > 0 {
			e.tel.selectors.remove(k)
			e.markWorkloads(k.ns, sel)
		} else if delete(e.tel.wide[k.ns], k); len(e.tel.wide[k.ns]) == 0 {
			delete(e.tel.wide, k.ns)
		}
	}
	if logs(t) {
		if sel := t.Spec.Selector.Labels(); len(sel) > 0 {
			e.tel.selectors.put(k, sel)
			e.markWorkloads(k.ns, sel)
		} else {
			if e.tel.wide[k.ns] == nil {
				e.tel.wide[k.ns] = map[nn]*crd.Telemetry{}
			}
			e.tel.wide[k.ns][k] = t
		}
	}
	root := e.set.isRoot(k.ns)
	for _, ns := range distinct(append([]string{k.ns}, e.set.roots...)) {
		for other := range e.tel.wide[ns] { // one of them may have won or lost
			if root == e.set.isRoot(other.ns) {
				e.tel.dirty[other] = struct{}{}
			}
		}
	}
	switch {
	case root && beforeMesh != e.meshLog():
		markAll(e.dirty.pods, e.pods)
		markAll(e.dirty.workloads, e.entries.workloads)
	case before != e.inheritedLog(k.ns):
		e.markWorkloads(k.ns, nil)
	}
}

// wideTelemetry is the Telemetry in force among those without a selector.
func (e *Engine) wideTelemetry(namespaces ...string) *crd.Telemetry {
	var best *crd.Telemetry
	for _, ns := range namespaces {
		for _, t := range e.tel.wide[ns] {
			if best == nil || olderTelemetry(t, best) {
				best = t
			}
		}
	}
	return best
}

// olderTelemetry: the oldest of a level is in force; without times the name decides.
func olderTelemetry(a, b *crd.Telemetry) bool {
	if !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
		return a.CreationTimestamp.Before(&b.CreationTimestamp)
	}
	return a.Name < b.Name || a.Name == b.Name && a.Namespace < b.Namespace
}

// meshLog is the access log that holds unless something narrower speaks.
func (e *Engine) meshLog() accessLog {
	if t := e.wideTelemetry(e.set.roots...); t != nil {
		log, _ := logOf(t, logAll)
		return log
	}
	return logAll
}

// inheritedLog is the access log of a workload of a namespace that nothing
// narrower speaks about.
func (e *Engine) inheritedLog(ns string) accessLog {
	log := e.meshLog()
	if !e.set.isRoot(ns) {
		if t := e.wideTelemetry(ns); t != nil {
			log, _ = logOf(t, log)
		}
	}
	if o := e.namespaces[ns]; o != nil {
		if own, ok := parseAccessLog(o.Annotations[accessLogAnnotation]); ok {
			log = own
		}
	}
	return log
}

// podLog is the access log of one pod: its annotation, else a Telemetry that
// selects it, else what its namespace and the mesh say.
func (e *Engine) podLog(k nn, labels, annotations map[string]string) accessLog {
	if own, ok := parseAccessLog(annotations[accessLogAnnotation]); ok {
		return own
	}
	log := e.inheritedLog(k.ns)
	var own *crd.Telemetry
	e.tel.selectors.choosing(k.ns, labels, func(t nn) {
		if o := e.tel.all[t]; own == nil || olderTelemetry(o, own) {
			own = o
		}
	})
	if own != nil {
		log, _ = logOf(own, log)
	}
	return log
}

// logOf reads accessLogging. Both sides of a connection have one setting here,
// so of two settings the one that logs more holds.
func logOf(t *crd.Telemetry, inherited accessLog) (accessLog, notes) {
	var n notes
	client, server := inherited, inherited
	for i, a := range t.Spec.AccessLogging {
		at := fmt.Sprintf("spec.accessLogging[%d]", i)
		log := logAll
		switch {
		case a.Disabled != nil && *a.Disabled:
			log = logOff
		case a.Filter != nil:
			meaning, ok := filterMeaning(a.Filter.Expression)
			if !ok {
				n.add("%s.filter.expression %q is not supported at layer 4, everything is logged: use %s for failed connections", at, a.Filter.Expression, failureFilters[0])
			}
			log = meaning
		}
		for _, p := range a.Providers {
			if p.Name != fileProvider {
				n.add("%s.providers: %s gets no lines of node proxies, which write their access log to standard output", at, p.Name)
			}
		}
		mode := crd.ModeBoth
		if a.Match != nil && a.Match.Mode != "" {
			mode = a.Match.Mode
		}
		if mode != crd.ModeServer {
			client = log
		}
		if mode != crd.ModeClient {
			server = log
		}
	}
	if client != server {
		n.add("spec.accessLogging: CLIENT is %s and SERVER is %s; node proxies have one setting for both, %s holds", logName(client), logName(server), logName(min(client, server)))
	}
	return min(client, server), n // ordered from more to fewer lines
}

// fileProvider is Istio's built-in access log to standard output.
const fileProvider = "envoy"

// failureFilters are the expressions that choose failed connections, without
// blanks: at layer 4 a failure is the only thing that sets these attributes.
var failureFilters = []string{
	`response.flags!=0`, `response.flags>0`, `response.code>=400`,
	`connection.response_flags!="-"`, `connection.response_flags!=""`,
	`connection.termination_details!=""`, `has(connection.termination_details)`,
	`upstream.transport_failure_reason!=""`,
}

// filterMeaning reads a CEL expression of the few forms that mean something
// here, also several joined by "||".
func filterMeaning(expression string) (accessLog, bool) {
	text := strings.ReplaceAll(strings.Join(strings.Fields(expression), ""), "'", `"`)
	switch text {
	case "true":
		return logAll, true
	case "false":
		return logOff, true
	}
	if !meansFailure(text) {
		return logAll, false
	}
	return logFailures, true
}

// meansFailure reads alternatives joined by "||", in parentheses or not.
func meansFailure(text string) bool {
	depth, outer := 0, true
	for i := range len(text) {
		switch {
		case text[i] == '(':
			depth++
		case text[i] == ')':
			depth--
		case depth == 0 && strings.HasPrefix(text[i:], "||"):
			return meansFailure(text[:i]) && meansFailure(text[i+2:])
		}
		outer = outer && (depth > 0 || i == len(text)-1)
	}
	if outer && depth == 0 && len(text) > 2 && text[0] == '(' {
		return meansFailure(text[1 : len(text)-1])
	}
	return slices.Contains(failureFilters, text)
}

// accessLogAnnotation is ours, on pods and namespaces.
const accessLogAnnotation = "ambit.dev/access-log"

func parseAccessLog(v string) (accessLog, bool) {
	switch v {
	case "all":
		return logAll, true
	case "failures":
		return logFailures, true
	case "off":
		return logOff, true
	}
	return logAll, false
}

func logName(l accessLog) string {
	return strings.ToLower(strings.TrimPrefix(l.String(), "ACCESS_LOG_"))
}

// telemetryConditions is what becomes of one Telemetry.
func (e *Engine) telemetryConditions(k nn) []Condition {
	t := e.tel.all[k]
	if t == nil {
		return nil
	}
	var n notes
	reason := ReasonUnsupported
	if len(t.Spec.Tracing) > 0 {
		n.add("spec.tracing is not enforced yet: node proxies make no spans")
	}
	if len(t.Spec.Metrics) > 0 {
		n.add("spec.metrics is not enforced yet: node proxies export every metric")
	}
	switch {
	case targetsWaypoint(t):
		n = notes{"spec.targetRefs binds it to a waypoint, which this build does not configure: it is not enforced"}
	case logs(t):
		_, faults := logOf(t, logAll)
		n = append(n, faults...)
		if len(t.Spec.Selector.Labels()) > 0 {
			break
		}
		level := []string{k.ns}
		if e.set.isRoot(k.ns) {
			level = e.set.roots
		}
		if first := e.wideTelemetry(level...); first != t {
			reason = ReasonConflict
			n = append(notes{fmt.Sprintf("spec.accessLogging: Telemetry %s/%s is older and in force", first.Namespace, first.Name)}, n...)
		}
	}
	c := Condition{Kind: "Telemetry", Namespace: k.ns, Name: k.name, Type: ConditionAccepted, Status: "True", Reason: ReasonAccepted}
	if len(n) > 0 {
		c.Status, c.Reason, c.Message = "False", reason, strings.Join(n, "; ")
	}
	return []Condition{c}
}
