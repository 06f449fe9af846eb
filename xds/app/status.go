package app

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/ca"
	"github.com/ambit-mesh/ambit/xds/serve"
)

// Status is what /status and `ambitd status` show.
type Status struct {
	Version     string         `json:"version"`
	Started     time.Time      `json:"started"`
	Pending     []string       `json:"pending"` // empty: ready
	ClusterID   string         `json:"cluster_id"`
	TrustDomain string         `json:"trust_domain"`
	Sources     []string       `json:"sources"`
	Changed     time.Time      `json:"last_change"`
	Changes     uint64         `json:"changes"`
	Objects     map[string]int `json:"objects"`
	Resources   map[string]int `json:"resources"`
	Problems    []Problem      `json:"problems"`
	Unenforced  map[string]int `json:"unenforced"`
	Proxies     []serve.Proxy  `json:"proxies"`
	CA          ca.Info        `json:"ca"`
	Followers   int            `json:"trust_followers"` // proxies that learn of roots and revocations at once
	ServerCert  time.Time      `json:"server_certificate_not_after"`
}

// Problem is something that is not in force as it is written.
type Problem struct {
	File      string `json:"file,omitempty"`
	Line      int    `json:"line,omitempty"`
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	Path      string `json:"path,omitempty"`
	Reason    string `json:"reason,omitempty"`
	Message   string `json:"message"`
	Hint      string `json:"hint,omitempty"`
	Text      string `json:"text"` // all of it in one line
}

func (a *ambitd) status() Status {
	s := Status{
		Version: boot.Version, Started: a.started.UTC(), Pending: a.ready.Pending(),
		ClusterID: a.cfg.ClusterID, TrustDomain: a.pipe.engine.TrustDomain(), Sources: a.cfg.Sources,
		Resources: map[string]int{}, Problems: []Problem{}, Proxies: a.server.Proxies(),
		CA: a.authority.Info(), Followers: a.server.TrustFollowers(), ServerCert: a.serverTLS.NotAfter().UTC(),
	}
	for _, t := range a.store.Types() {
		s.Resources[t[strings.LastIndexByte(t, '/')+1:]] = a.store.Len(t)
	}
	a.pipe.mu.RLock()
	defer a.pipe.mu.RUnlock()
	r := &a.pipe.report
	s.Changed, s.Changes = r.changed.UTC(), r.changes
	s.Objects, s.Unenforced = maps.Clone(r.objects), maps.Clone(r.unenforced)
	for _, p := range r.problems {
		s.Problems = append(s.Problems, Problem{
			File: p.File, Line: p.Line, Kind: p.Kind, Namespace: p.Namespace, Name: p.Name,
			Path: p.Path, Message: p.Message, Hint: p.Hint, Text: p.String(),
		})
	}
	for _, c := range r.conditions {
		s.Problems = append(s.Problems, Problem{
			Kind: c.Kind, Namespace: c.Namespace, Name: c.Name, Reason: c.Reason, Message: c.Message,
			Text: fmt.Sprintf("%s %s: %s: %s", c.Kind, objectName(c.Namespace, c.Name), c.Reason, c.Message),
		})
	}
	return s
}

func (a *ambitd) serveStatus(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(a.status()) // the client has gone: nothing to do
}

// Healthy reports whether everything is in force as written, every proxy took
// it, and no CA certificate is in the last quarter of its life.
func (s *Status) Healthy() bool {
	return len(s.Problems) == 0 && len(s.CA.Warnings) == 0 && len(s.Pending) == 0 && !slices.ContainsFunc(s.Proxies, rejecting)
}

func rejecting(p serve.Proxy) bool { return rejection(p) != "" }

// rejection says what the proxy refuses at the moment, "" for nothing.
func rejection(p serve.Proxy) string {
	for _, t := range p.Types {
		if t.Rejected > 0 {
			return fmt.Sprintf("%d: %s", t.Rejected, t.LastNack)
		}
	}
	return ""
}

// WriteText writes the status for people, aligned.
func (s *Status) WriteText(w io.Writer, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	state := "ready"
	if len(s.Pending) > 0 {
		state = "not ready, pending: " + strings.Join(s.Pending, ", ")
	}
	fmt.Fprintf(t, "ambitd\t%s, %s, up %s\n", s.Version, state, age(now, s.Started))
	fmt.Fprintf(t, "cluster\t%s, trust domain %s\n", s.ClusterID, s.TrustDomain)
	fmt.Fprintf(t, "sources\t%s, last change %s ago\n", strings.Join(s.Sources, ", "), age(now, s.Changed))
	fmt.Fprintf(t, "objects\t%s\n", countsText(s.Objects))
	fmt.Fprintf(t, "resources\t%s\n", countsText(s.Resources))
	fmt.Fprintf(t, "not enforced\t%s\n", countsText(s.Unenforced))
	kind := "plugged-in"
	if s.CA.SelfSigned {
		kind = "self-signed"
	}
	fmt.Fprintf(t, "ca\t%s, %s, valid until %s\n", kind, s.CA.Subject, s.CA.NotAfter.Format(time.DateOnly))
	fmt.Fprintf(t, "trust\tgeneration %d, %d proxies follow\n", s.CA.Generation, s.Followers)
	fmt.Fprintf(t, "problems\t%d\n", len(s.Problems)+len(s.CA.Warnings))
	if err := t.Flush(); err != nil {
		return err
	}
	for _, text := range s.CA.Warnings {
		fmt.Fprintln(w, "  ca: "+text)
	}
	for _, p := range s.Problems {
		fmt.Fprintln(w, "  "+p.Text)
	}
	return s.writeProxies(w, now)
}

func (s *Status) writeProxies(w io.Writer, now time.Time) error {
	if len(s.Proxies) == 0 {
		_, err := fmt.Fprintln(w, "\nno proxy is connected")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "\nPROXY\tNODE\tCONNECTED\tSYNCED\tADDRESS\tAUTHORIZATION\tREJECTED")
	for _, p := range s.Proxies {
		columns := map[string]string{}
		for _, ty := range p.Types {
			columns[ty.Type[strings.LastIndexByte(ty.Type, '.')+1:]] = fmt.Sprintf("%d/%d", ty.Acked, ty.Sent)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", dash(p.Node), dash(p.OnNode), age(now, p.Connected), yes(p.Synced),
			dash(columns["Address"]), dash(columns["Authorization"]), dash(rejection(p)))
	}
	return t.Flush()
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func age(now, t time.Time) time.Duration { return now.Sub(t).Truncate(time.Second) }
