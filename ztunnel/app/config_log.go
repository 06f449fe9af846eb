package app

import (
	"slices"
	"strings"

	"github.com/ambit-mesh/ambit/xds/boot"
)

type logging struct{ rust string }

// scopes are the reference's log targets, longest first, and what logs the same
// here.
var scopes = []struct{ target, scope string }{
	{"ztunnel::xds", "xds"}, {"ztunnel::state", "xds"}, {"ztunnel::identity", "cert"}, {"ztunnel::tls", "cert"},
	{"ztunnel::inpod", "inpod"}, {"ztunnel::dns", "dns"}, {"ztunnel::admin", "admin"}, {"ztunnel::proxy::h2", "hbone"},
	{"ztunnel::proxy::pool", "hbone"}, {"ztunnel::proxy", "access"}, {"ztunnel::readiness", "readiness"},
	{"xds", "xds"}, {"access", "access"}, {"dns", "dns"}, {"inpod", "inpod"}, {"cert", "cert"}, {"hbone", "hbone"},
	{"admin", "admin"}, {"agent", "agent"}, {"app", "app"}, {"metrics", "metrics"}, {"readiness", "readiness"}, {"policy", "policy"},
	{"rbac", "policy"}, {"state", "xds"},
}

// scopeOf is the log scope that a target of the reference means; "" if there is
// none.
func scopeOf(target string) string {
	for _, s := range scopes {
		if target == s.target || strings.HasPrefix(target, s.target+"::") {
			return s.scope
		}
	}
	return ""
}

// rustLog translates RUST_LOG: a level, target=level, or a target alone, which
// means everything of it. Spans and a filter by text are not translated.
func rustLog(spec string) (levels string, unknown []string) {
	spec, filter, _ := strings.Cut(spec, "/")
	if filter != "" {
		unknown = append(unknown, "/"+filter)
	}
	var out []string
	for term := range strings.SplitSeq(spec, ",") {
		term = strings.TrimSpace(term)
		target, level, scoped := strings.Cut(term, "=")
		if !scoped {
			if _, err := boot.ParseLevel(term); err == nil || term == "" {
				out = append(out, term)
				continue
			}
			level = "trace"
		}
		switch scope := scopeOf(target); {
		case target == "ztunnel":
			out = append(out, level)
		case scope == "":
			unknown = append(unknown, target)
		default:
			out = append(out, scope+"="+level)
		}
	}
	out = slices.DeleteFunc(out, func(s string) bool { return s == "" })
	if len(out) == 0 {
		return "info", unknown
	}
	return strings.Join(out, ","), unknown
}
