package app

import (
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

func (a *app) admin(levels *boot.LevelControl, quit func()) http.Handler {
	return boot.AdminMux(boot.AdminConfig{Levels: levels, Shutdown: quit, Handlers: map[string]http.Handler{
		"GET /config_dump": jsonPage(func() any { return a.dump() }),
		"GET /connections": jsonPage(func() any { return a.node.flow.List() }),
		"GET /refusals":    a.refusals(),
	}})
}

func jsonPage(f func() any) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		_ = e.Encode(f()) // the client has gone: nothing to do
	})
}

// refusals is what this proxy refused, or was refused, of late: JSON, or a
// table with ?format=text.
func (a *app) refusals() http.Handler {
	asJSON := jsonPage(func() any { return a.node.flow.Refusals() })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch f := r.URL.Query().Get("format"); f {
		case "", "json":
			asJSON.ServeHTTP(w, r)
		case "text":
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			_ = flow.WriteRefusals(w, a.node.flow.Refusals()) // the client has gone: nothing to do
		default:
			http.Error(w, fmt.Sprintf("format %q: one of json, text", f), http.StatusBadRequest)
		}
	})
}
