package load

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"fortio.org/fortio/fhttp"
	fortiolog "fortio.org/log"
)

// quietFortio keeps its library from writing a line per request that fails: they
// are counted here.
var quietFortio = sync.OnceFunc(func() { fortiolog.SetLogLevelQuiet(fortiolog.Critical) })

// http makes requests with fortio's clients: its own one for HTTP/1.1, Go's for
// HTTP/2, one connection per worker. When they are made and from when they are
// measured is decided here (schedule): fortio's runner starts its clock when a
// request is sent, not when it was due.
func (r *run) http(w *worker, i int) error {
	defer r.pin()()
	o := fhttp.NewHTTPOptions(fmt.Sprintf("http://%s/", r.Server))
	o.Payload, o.HTTPReqTimeOut, o.NumConnections, o.ID = make([]byte, r.Size), r.Timeout, 1, i
	o.H2, o.DisableFastClient = r.H2, r.H2
	c, err := fhttp.NewClient(o)
	if err != nil {
		return fmt.Errorf("make HTTP client: %w", err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	var opened int64 = 1
	for first := true; !r.ended.Load(); first = false {
		began, err := r.turn(w)
		if err != nil {
			return err
		}
		if first && r.PerSec == 0 {
			began = 0 // with the connection's beginning in it, not timed
		}
		code, n, _ := c.StreamFetch(ctx)
		if code != http.StatusOK {
			return fmt.Errorf("HTTP status %d, %d bytes", code, n)
		}
		// A client that finds its connection closed makes another and tells nobody.
		if _, conns := c.GetIPAddress(); conns.Count > opened {
			r.fault(fmt.Errorf("HTTP connection ended, request sent again"))
			opened = conns.Count
		}
		r.done(w, monotonic()-began, began != 0)
	}
	return nil
}

// page answers a request with its body.
func page(w http.ResponseWriter, q *http.Request) {
	buf := buffers.Get().(*[]byte) // its New makes nothing else
	defer buffers.Put(buf)
	n := 0
	for n < len(*buf) {
		k, err := q.Body.Read((*buf)[n:])
		if n += k; err != nil {
			break
		}
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	_, _ = w.Write((*buf)[:n]) // a client that is gone counts it
}

var buffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// httpServer speaks both versions in clear text.
func httpServer() *http.Server {
	s := &http.Server{Handler: http.HandlerFunc(page), Protocols: new(http.Protocols), ReadHeaderTimeout: time.Minute}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	return s
}
