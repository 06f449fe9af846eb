package golden

import (
	"regexp"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// A description prints as
// Desc{fqName: "x", help: "y", constLabels: {a="b"}, variableLabels: {c,d}}.
var descText = regexp.MustCompile(`fqName: "([^"]*)".*constLabels: \{([^}]*)\}, variableLabels: \{([^}]*)\}`)

// Metrics lists the metrics of a registry as name{labels}, one a line, sorted:
// what dashboards and alerts are written against. Metrics without a value yet
// are there too.
func Metrics(reg *prometheus.Registry) string {
	ch := make(chan *prometheus.Desc)
	go func() {
		defer close(ch)
		reg.Describe(ch)
	}()
	var lines []string
	for d := range ch {
		m := descText.FindStringSubmatch(d.String())
		if m == nil {
			lines = append(lines, d.String())
			continue
		}
		labels := strings.Trim(m[2]+","+m[3], ",")
		if labels != "" {
			labels = "{" + labels + "}"
		}
		lines = append(lines, m[1]+labels)
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n"
}
