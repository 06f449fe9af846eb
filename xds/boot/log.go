package boot

import (
	"context"
	"encoding"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/netip"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"
)

// ScopeKey is the attribute that names a logger's scope, the unit of level
// control: log.With(boot.ScopeKey, "access").
const ScopeKey = "scope"

// NewLogger returns a logger that writes one line per record to w in a single
// Write, and the control of its levels. Format is "text", the reference's
// layout
//
//	2026-01-02T03:04:05.678901Z\tinfo\taccess\tconnection complete\tsrc.addr=10.0.0.1:80 bytes_sent=5 duration="3ms"
//
// or "json" with the same fields. Level is what LevelControl.Set reads. A
// wrong format or level leaves text and info in force, so that there is always
// a logger to say so with: mains refuse them first, with CheckLogging.
func NewLogger(w io.Writer, format, level string) (*slog.Logger, *LevelControl) {
	ctl := newLevelControl()
	if ctl.Set(level) == nil {
		ctl.initial = level
	}
	h := &handler{out: &lineWriter{w: w}, ctl: ctl, scope: "app", json: format == "json"}
	h.level = ctl.scope(h.scope)
	log := slog.New(h)
	if q, ok := w.(*Queue); ok {
		own := Scoped(log, "log")
		q.onRecovery(func(dropped uint64) { own.Warn("log lines dropped", "count", dropped) })
	}
	return log, ctl
}

// CheckLogging reports a format or level that NewLogger would not follow.
func CheckLogging(format, level string) error {
	if format != "" && format != "text" && format != "plain" && format != "json" {
		return fmt.Errorf("log format %q: one of text, json", format)
	}
	return newLevelControl().Set(level)
}

// Scoped returns the logger of one scope.
func Scoped(log *slog.Logger, scope string) *slog.Logger { return log.With(ScopeKey, scope) }

// lineWriter keeps lines of concurrent records apart.
type lineWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lineWriter) write(line []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err := l.w.Write(line)
	return err
}

// handler is immutable; With returns changed copies.
type handler struct {
	out    *lineWriter
	ctl    *LevelControl
	level  *slog.LevelVar
	scope  string
	json   bool
	fixed  []byte // attributes of With, already formatted, each preceded by its separator
	prefix string // open groups, "a.b."
}

func (h *handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level.Level() }

func (h *handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	c := *h
	c.prefix += name + "."
	return &c
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.fixed = append([]byte(nil), h.fixed...)
	for _, a := range attrs {
		if a.Key == ScopeKey && h.prefix == "" {
			c.scope = a.Value.String()
			c.level = h.ctl.scope(c.scope)
			continue
		}
		c.fixed = c.appendAttr(c.fixed, h.prefix, a)
	}
	return &c
}

var lines = sync.Pool{New: func() any { b := make([]byte, 0, 1024); return &b }}

// maxPooledLine keeps one huge record from staying in the pool for ever.
const maxPooledLine = 16 << 10

func (h *handler) Handle(_ context.Context, r slog.Record) error {
	p := lines.Get().(*[]byte)
	b := (*p)[:0]
	if h.json {
		b = h.appendJSON(b, r)
	} else {
		b = h.appendText(b, r)
	}
	b = append(b, '\n')
	err := h.out.write(b)
	if cap(b) <= maxPooledLine {
		*p = b
		lines.Put(p)
	}
	return err
}

const timeLayout = "2006-01-02T15:04:05.000000Z"

func (h *handler) appendText(b []byte, r slog.Record) []byte {
	b = r.Time.UTC().AppendFormat(b, timeLayout)
	b = append(b, '\t')
	b = append(b, levelName(r.Level)...)
	b = append(b, '\t')
	b = append(b, h.scope...)
	b = append(b, '\t')
	b = appendPlain(b, r.Message)
	b = append(b, '\t')
	start := len(b)
	b = append(b, h.fixed...)
	r.Attrs(func(a slog.Attr) bool { b = h.appendAttr(b, h.prefix, a); return true })
	if len(b) == start {
		return b[:start-1] // no attributes: no trailing tab
	}
	return append(b[:start], b[start+1:]...) // the first attribute's separator
}

// appendPlain keeps a message on its line: peers choose part of some messages,
// and a forged line break would be a forged record.
func appendPlain(b []byte, s string) []byte {
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == utf8.RuneError {
			r = ' '
		}
		b = utf8.AppendRune(b, r)
	}
	return b
}

func (h *handler) appendJSON(b []byte, r slog.Record) []byte {
	b = append(b, `{"level":"`...)
	b = append(b, levelName(r.Level)...)
	b = append(b, `","time":"`...)
	b = r.Time.UTC().AppendFormat(b, timeLayout)
	b = append(b, `","scope":`...)
	b = appendJSONString(b, h.scope)
	b = append(b, `,"message":`...)
	b = appendJSONString(b, r.Message)
	b = append(b, h.fixed...)
	r.Attrs(func(a slog.Attr) bool { b = h.appendAttr(b, h.prefix, a); return true })
	return append(b, '}')
}

func (h *handler) appendAttr(b []byte, prefix string, a slog.Attr) []byte {
	v := a.Value.Resolve()
	if a.Equal(slog.Attr{}) {
		return b
	}
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			prefix += a.Key + "."
		}
		for _, g := range v.Group() {
			b = h.appendAttr(b, prefix, g)
		}
		return b
	}
	if h.json {
		b = append(b, ',')
		b = appendJSONString(b, prefix+a.Key)
		return appendValue(append(b, ':'), v, true)
	}
	b = append(b, ' ')
	b = append(b, prefix...)
	b = append(b, a.Key...)
	return appendValue(append(b, '='), v, false)
}

// appendValue writes numbers, booleans and (in text) addresses bare, all else
// quoted, as the reference does.
func appendValue(b []byte, v slog.Value, asJSON bool) []byte {
	switch v.Kind() {
	case slog.KindInt64:
		return strconv.AppendInt(b, v.Int64(), 10)
	case slog.KindUint64:
		return strconv.AppendUint(b, v.Uint64(), 10)
	case slog.KindBool:
		return strconv.AppendBool(b, v.Bool())
	case slog.KindFloat64:
		f := v.Float64()
		if asJSON && (math.IsNaN(f) || math.IsInf(f, 0)) {
			return appendString(b, strconv.FormatFloat(f, 'g', -1, 64), asJSON)
		}
		return strconv.AppendFloat(b, f, 'g', -1, 64)
	case slog.KindDuration:
		return appendString(b, v.Duration().String(), asJSON)
	case slog.KindTime:
		b = append(b, '"')
		b = v.Time().UTC().AppendFormat(b, time.RFC3339Nano)
		return append(b, '"')
	case slog.KindString:
		return appendString(b, v.String(), asJSON)
	}
	return appendAny(b, v.Any(), asJSON)
}

func appendAny(b []byte, x any, asJSON bool) []byte {
	switch x := x.(type) {
	case netip.AddrPort:
		if !asJSON && x.IsValid() {
			return x.AppendTo(b)
		}
		return appendString(b, x.String(), asJSON)
	case netip.Addr:
		if !asJSON && x.IsValid() {
			return x.AppendTo(b)
		}
		return appendString(b, x.String(), asJSON)
	case error:
		return appendString(b, x.Error(), asJSON)
	case fmt.Stringer:
		return appendString(b, x.String(), asJSON)
	case encoding.TextMarshaler:
		if t, err := x.MarshalText(); err == nil {
			return appendString(b, string(t), asJSON)
		}
	}
	if asJSON {
		if j, err := json.Marshal(x); err == nil {
			return append(b, j...)
		}
	}
	return appendString(b, fmt.Sprintf("%+v", x), asJSON)
}

func appendString(b []byte, s string, asJSON bool) []byte {
	if asJSON {
		return appendJSONString(b, s)
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			return strconv.AppendQuote(b, s)
		}
	}
	b = append(b, '"') // most need no more
	b = append(b, s...)
	return append(b, '"')
}

func appendJSONString(b []byte, s string) []byte {
	for i := 0; i < len(s); i++ {
		if c := s[i]; c < ' ' || c == '"' || c == '\\' || c >= utf8.RuneSelf {
			j, _ := json.Marshal(s) // a string always marshals; invalid UTF-8 is replaced
			return append(b, j...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}
