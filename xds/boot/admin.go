package boot

import (
	"fmt"
	"html"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"net/url"
	"slices"
	"strings"
)

// AdminConfig is what an operator on the same host may see and do.
type AdminConfig struct {
	Levels *LevelControl
	// Shutdown is called by POST /quitquitquit; nil leaves the path out.
	Shutdown func()
	// Handlers are the component's own pages, by ServeMux pattern.
	Handlers map[string]http.Handler
}

// AdminMux is the handler of a process's admin port: /logging, /debug/pprof
// and the component's pages. It answers only requests that come from, and are
// addressed to, this host: the port has no other protection, and a page in a
// browser must not reach it under a name of its own (DNS rebinding).
func AdminMux(c AdminConfig) *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.Handle("/debug/pprof/block", blockProfile())
	mux.Handle("/debug/pprof/mutex", mutexProfile())
	if c.Levels != nil {
		mux.HandleFunc("/logging", c.Levels.serveHTTP)
	}
	if c.Shutdown != nil {
		mux.HandleFunc("POST /quitquitquit", func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintln(w, "shutting down")
			c.Shutdown()
		})
	}
	mux.HandleFunc("GET /{$}", index(c))
	for pattern, h := range c.Handlers {
		mux.Handle(pattern, h)
	}
	guarded := http.NewServeMux()
	guarded.Handle("/", localOnly(mux))
	return guarded
}

// serveHTTP answers /logging: GET shows the levels, POST or PUT with
// ?level=SPEC or ?SCOPE=LEVEL sets them. `?level=reset` and `?reset` return to
// the start's.
func (c *LevelControl) serveHTTP(w http.ResponseWriter, r *http.Request) {
	spec := levelSpec(r.URL.Query())
	if spec == "" {
		fmt.Fprintf(w, "current log level is %s\n", c)
		return
	}
	if r.Method != http.MethodPost && r.Method != http.MethodPut {
		http.Error(w, "use POST to set a level: curl -X POST 'localhost:15000/logging?level="+spec+"'", http.StatusMethodNotAllowed)
		return
	}
	if err := c.Set(spec); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	fmt.Fprintf(w, "current log level is %s\n", c)
}

// levelSpec joins what a query asks for into one specification.
func levelSpec(q url.Values) string {
	var terms []string
	for _, k := range slices.Sorted(maps.Keys(q)) {
		for _, v := range q[k] {
			switch {
			case k == "level":
				terms = append(terms, v)
			case k == "reset":
				terms = append([]string{"reset"}, terms...)
			default:
				terms = append(terms, k+"="+v)
			}
		}
	}
	return strings.Join(terms, ",")
}

// index lists the pages of a process for a browser.
func index(c AdminConfig) http.HandlerFunc {
	pages := []string{"/debug/pprof/"}
	if c.Levels != nil {
		pages = append(pages, "/logging")
	}
	for pattern := range c.Handlers {
		if path, ok := strings.CutPrefix(pattern, "GET "); ok {
			pages = append(pages, path)
		}
	}
	slices.Sort(pages)
	var b strings.Builder
	b.WriteString("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>admin</title></head><body>\n<h1>admin</h1>\n<ul>\n")
	for _, p := range pages {
		fmt.Fprintf(&b, "<li><a href=\"%s\">%s</a></li>\n", html.EscapeString(p), html.EscapeString(p))
	}
	b.WriteString("</ul>\n<p>POST /logging?level=debug, ?level=scope:debug or ?reset sets log levels")
	if c.Shutdown != nil {
		b.WriteString("; POST /quitquitquit ends the process in order")
	}
	b.WriteString(".</p>\n</body></html>\n")
	page := b.String()
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = io.WriteString(w, page) // the browser has gone: nothing to do
	}
}

func localOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !loopback(r.RemoteAddr) || !loopback(r.Host) {
			http.Error(w, "the admin port answers only this host, under localhost or a loopback address", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// loopback reports whether "host:port" or "host" names this host. A unix
// socket's peer has no address ("@" or "").
func loopback(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = strings.Trim(hostport, "[]")
	}
	if host == "localhost" || host == "" || host == "@" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.Unmap().IsLoopback()
}
