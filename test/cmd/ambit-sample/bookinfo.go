package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"html/template"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

// book is one service of bookinfo.
type book struct {
	version string
	client  *http.Client
}

// bookinfo serves a role on port 9080 until ctx ends.
func bookinfo(role func(*book) http.Handler) func(context.Context, []string, io.Writer) error {
	return func(ctx context.Context, args []string, out io.Writer) error {
		fs := flag.NewFlagSet("bookinfo", flag.ContinueOnError)
		version := fs.String("version", "v1", "version")
		addr := fs.String("addr", ":9080", "address")
		if err := fs.Parse(args); err != nil {
			return err
		}
		ln, err := net.Listen("tcp", *addr)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%s %s on %s\n", hostname(), *version, ln.Addr())
		srv := &http.Server{Handler: role(&book{*version, &http.Client{
			Timeout: 5 * time.Second,
			// As in the original, each call is a connection of its own, so that calls
			// spread over the versions of reviews.
			Transport: &http.Transport{DisableKeepAlives: true},
		}}), ReadHeaderTimeout: time.Minute}
		context.AfterFunc(ctx, func() { _ = srv.Close() })
		if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	}
}

// passed are the request headers that every service hands on: the user, and what
// tracing needs.
var passed = []string{"end-user", "user-agent", "cookie", "authorization", "jwt", "x-request-id", "traceparent", "tracestate",
	"x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags", "b3", "baggage"}

// fetch calls another service. Hosts can be set as in the original.
func (b *book) fetch(r *http.Request, service, path string, into any) error {
	host := cmp.Or(os.Getenv(map[string]string{"details": "DETAILS_HOSTNAME", "ratings": "RATINGS_HOSTNAME", "reviews": "REVIEWS_HOSTNAME"}[service]), service)
	if d := os.Getenv("SERVICES_DOMAIN"); d != "" {
		host += "." + d
	}
	req, err := http.NewRequestWithContext(r.Context(), http.MethodGet, "http://"+net.JoinHostPort(host, cmp.Or(os.Getenv("SERVICE_PORT"), "9080"))+path, nil)
	if err != nil {
		return err
	}
	for _, h := range passed {
		if v := r.Header.Get(h); v != "" {
			req.Header.Set(h, v)
		}
	}
	resp, err := b.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", service, resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client sees a short body
}

func healthy(mux *http.ServeMux, what string) {
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { reply(w, 200, map[string]string{"status": what}) })
}

// product returns the number in the path, or answers that there is none.
func product(w http.ResponseWriter, r *http.Request) (int, bool) {
	id, err := strconv.Atoi(r.PathValue("id"))
	if err != nil {
		reply(w, http.StatusBadRequest, map[string]string{"error": "please provide numeric product ID"})
		return 0, false
	}
	return id, true
}

type detail struct {
	ID        int    `json:"id"`
	Author    string `json:"author"`
	Year      int    `json:"year"`
	Type      string `json:"type"`
	Pages     int    `json:"pages"`
	Publisher string `json:"publisher"`
	Language  string `json:"language"`
	ISBN10    string `json:"ISBN-10"`
	ISBN13    string `json:"ISBN-13"`
}

func details(*book) http.Handler {
	mux := http.NewServeMux()
	healthy(mux, "Details is healthy")
	mux.HandleFunc("GET /details/{id}", func(w http.ResponseWriter, r *http.Request) {
		if id, ok := product(w, r); ok {
			reply(w, 200, detail{id, "William Shakespeare", 1595, "paperback", 200, "PublisherA", "English", "1234567890", "123-1234567890"})
		}
	})
	return mux
}

type score struct {
	ID      int            `json:"id"`
	Ratings map[string]int `json:"ratings"`
}

func ratings(*book) http.Handler {
	mux := http.NewServeMux()
	healthy(mux, "Ratings is healthy")
	mux.HandleFunc("GET /ratings/{id}", func(w http.ResponseWriter, r *http.Request) {
		if id, ok := product(w, r); ok {
			reply(w, 200, score{id, map[string]int{"Reviewer1": 5, "Reviewer2": 4}})
		}
	})
	return mux
}

type review struct {
	Reviewer string  `json:"reviewer"`
	Text     string  `json:"text"`
	Rating   *rating `json:"rating,omitempty"`
}

type rating struct {
	Stars int    `json:"stars,omitempty"`
	Color string `json:"color,omitempty"`
	Error string `json:"error,omitempty"`
}

type reviewList struct {
	ID      string   `json:"id"`
	Podname string   `json:"podname"`
	Cluster string   `json:"clustername"`
	Reviews []review `json:"reviews"`
}

// reviews has no stars in v1, black ones in v2 and red ones in v3.
func reviews(b *book) http.Handler {
	color := map[string]string{"v2": "black", "v3": "red"}[b.version]
	mux := http.NewServeMux()
	healthy(mux, "Reviews is healthy")
	mux.HandleFunc("GET /reviews/{id}", func(w http.ResponseWriter, r *http.Request) {
		id, ok := product(w, r)
		if !ok {
			return
		}
		one := review{Reviewer: "Reviewer1", Text: "An extremely entertaining play by Shakespeare. The slapstick humour is refreshing!"}
		two := review{Reviewer: "Reviewer2", Text: "Absolutely fun and entertaining. The play lacks thematic depth when compared to other plays by Shakespeare."}
		if color != "" {
			var s score
			if err := b.fetch(r, "ratings", fmt.Sprintf("/ratings/%d", id), &s); err != nil {
				one.Rating = &rating{Error: "Ratings service is currently unavailable"}
				two.Rating = one.Rating
			} else {
				one.Rating = &rating{Stars: s.Ratings["Reviewer1"], Color: color}
				two.Rating = &rating{Stars: s.Ratings["Reviewer2"], Color: color}
			}
		}
		reply(w, 200, reviewList{strconv.Itoa(id), hostname(), "null", []review{one, two}})
	})
	return mux
}

var page = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html><head><title>Simple Bookstore App</title><link rel="stylesheet" href="static/style.css"></head><body>
<header>BookInfo Sample{{if .User}} <span id="user">{{.User}}</span> <a href="logout">sign out</a>{{else}}
<form method="post" action="login"><input name="username"><input name="passwd" type="password"><button>Sign in</button></form>{{end}}</header>
<h3>The Comedy of Errors</h3>
<h4>Book Details</h4>{{if .DetailsError}}<p class="error">Error fetching product details!</p>{{else}}
<dl><dt>ISBN-10</dt><dd>{{.Details.ISBN10}}</dd><dt>Publisher</dt><dd>{{.Details.Publisher}}</dd><dt>Pages</dt><dd>{{.Details.Pages}}</dd><dt>Type</dt><dd>{{.Details.Type}}</dd><dt>Language</dt><dd>{{.Details.Language}}</dd></dl>{{end}}
<h4>Book Reviews</h4>{{if .ReviewsError}}<p class="error">Error fetching product reviews!</p>{{end}}
{{range .Reviews.Reviews}}<blockquote><p>{{.Text}}</p><small>{{.Reviewer}}</small>
{{with .Rating}}{{if .Error}}<p class="error">{{.Error}}</p>{{else}}<span class="stars" style="color:{{.Color}}">{{range $.Stars .Stars}}★{{end}}</span>{{end}}{{end}}</blockquote>
{{end}}<p>Reviews served by: <u>{{.Reviews.Podname}}</u></p>
</body></html>
`))

// view is the data of the page.
type view struct {
	User                       string
	Details                    detail
	Reviews                    reviewList
	DetailsError, ReviewsError error
}

// Stars makes n items to range over.
func (view) Stars(n int) []struct{} { return make([]struct{}, n) }

// productpage keeps the signed-in user in a cookie and hands it on as end-user.
func productpage(b *book) http.Handler {
	mux := http.NewServeMux()
	healthy(mux, "Product page is healthy")
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "productpage", http.StatusFound) })
	mux.HandleFunc("GET /productpage", func(w http.ResponseWriter, r *http.Request) {
		v := view{User: signIn(r)}
		v.DetailsError = b.fetch(r, "details", "/details/0", &v.Details)
		v.ReviewsError = b.fetch(r, "reviews", "/reviews/0", &v.Reviews)
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_ = page.Execute(w, v) // the client sees a short body
	})
	mux.HandleFunc("POST /login", func(w http.ResponseWriter, r *http.Request) {
		http.SetCookie(w, &http.Cookie{Name: "end-user", Value: r.FormValue("username"), Path: "/", HttpOnly: true})
		http.Redirect(w, r, "productpage", http.StatusFound)
	})
	mux.HandleFunc("GET /logout", func(w http.ResponseWriter, r *http.Request) {
		http.SetCookie(w, &http.Cookie{Name: "end-user", Path: "/", MaxAge: -1})
		http.Redirect(w, r, "productpage", http.StatusFound)
	})
	mux.HandleFunc("GET /static/", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/css")
		fmt.Fprintln(w, "body { font-family: sans-serif; margin: 2em } .stars { font-size: 1.5em } .error { color: #b00 }")
	})
	mux.HandleFunc("GET /api/v1/products", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, 200, []map[string]any{{"id": 0, "title": "The Comedy of Errors", "descriptionHtml": "A play by William Shakespeare."}})
	})
	relay := func(path, service string, into func() any) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			signIn(r)
			id, ok := product(w, r)
			if !ok {
				return
			}
			v := into()
			if err := b.fetch(r, service, fmt.Sprintf("/%s/%d", service, id), v); err != nil {
				reply(w, http.StatusServiceUnavailable, map[string]string{"error": err.Error()})
				return
			}
			reply(w, 200, v)
		})
	}
	relay("/api/v1/products/{id}", "details", func() any { return new(detail) })
	relay("/api/v1/products/{id}/reviews", "reviews", func() any { return new(reviewList) })
	relay("/api/v1/products/{id}/ratings", "ratings", func() any { return new(score) })
	return mux
}

// signIn turns the cookie into the header that the other services see.
func signIn(r *http.Request) string {
	if c, err := r.Cookie("end-user"); err == nil && c.Value != "" {
		r.Header.Set("end-user", c.Value)
	}
	return r.Header.Get("end-user")
}
