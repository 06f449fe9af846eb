package boot

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
)

// LevelTrace and LevelOff extend slog's levels to those that operators of
// ztunnel know.
const (
	LevelTrace = slog.LevelDebug - 4
	LevelOff   = slog.LevelError + 100
)

// LevelControl holds the level of each log scope. A scope without a level of
// its own follows the default one. Loggers hold a pointer to their scope's
// level, so asking whether a line is wanted costs one atomic load.
type LevelControl struct {
	mu       sync.Mutex
	initial  string                    // guarded by mu; what reset returns to
	fallback slog.Level                // guarded by mu
	own      map[string]slog.Level     // guarded by mu; scopes with a level of their own
	scopes   map[string]*slog.LevelVar // guarded by mu; every scope seen so far
	rename   func(string) string       // guarded by mu; nil keeps names
}

// Rename lets operators call scopes by other names: f returns the scope that a
// name means, or "" for one that means itself. Call it before Set is offered to
// anybody.
func (c *LevelControl) Rename(f func(string) string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rename = f
}

func newLevelControl() *LevelControl {
	return &LevelControl{fallback: slog.LevelInfo, own: map[string]slog.Level{}, scopes: map[string]*slog.LevelVar{}}
}

// scope returns the live level of a scope.
func (c *LevelControl) scope(name string) *slog.LevelVar {
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.scopes[name]
	if !ok {
		v = new(slog.LevelVar)
		c.scopes[name] = v
		c.applyLocked()
	}
	return v
}

func (c *LevelControl) applyLocked() {
	for name, v := range c.scopes {
		level, ok := c.own[name]
		if !ok {
			level = c.fallback
		}
		v.Set(level)
	}
}

// Set applies a comma-separated list such as "info,access=debug,xds:trace": a
// bare level is the default and clears no scope; scope=level and scope:level
// set one scope. "reset" returns to what the process started with. Nothing is
// applied when a term is wrong.
func (c *LevelControl) Set(spec string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	fallback, own := c.fallback, maps.Clone(c.own)
	terms := strings.Split(spec, ",")
	for i := 0; i < len(terms); i++ {
		term := strings.TrimSpace(terms[i])
		if term == "" {
			continue
		}
		if term == "reset" {
			fallback, own = slog.LevelInfo, map[string]slog.Level{}
			if !strings.Contains(c.initial, "reset") {
				terms = append(terms[:i+1], append(strings.Split(c.initial, ","), terms[i+1:]...)...)
			}
			continue
		}
		name, text, scoped := cutScope(term)
		if c.rename != nil && name != "" {
			if own := c.rename(name); own != "" {
				name = own
			}
		}
		level, err := ParseLevel(text)
		switch {
		case err != nil:
			return fmt.Errorf("log level %q: %w", term, err)
		case !scoped:
			fallback = level
		case name == "":
			return fmt.Errorf("log level %q: empty scope, write scope=level", term)
		default:
			own[name] = level
		}
	}
	if len(own) > maxScopes {
		return fmt.Errorf("log level: more than %d scopes", maxScopes)
	}
	c.fallback, c.own = fallback, own
	c.applyLocked()
	return nil
}

// maxScopes bounds what /logging can make a process remember (arbitrary, far
// above the number of scopes that exist).
const maxScopes = 256

func cutScope(term string) (name, level string, scoped bool) {
	i := strings.LastIndexAny(term, "=:")
	if i < 0 {
		return "", term, false
	}
	return term[:i], term[i+1:], true
}

// String lists the levels in the form that Set reads, scopes sorted.
func (c *LevelControl) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var b strings.Builder
	b.WriteString(levelName(c.fallback))
	for _, name := range slices.Sorted(maps.Keys(c.own)) {
		fmt.Fprintf(&b, ",%s=%s", name, levelName(c.own[name]))
	}
	return b.String()
}

// ParseLevel reads one level name.
func ParseLevel(s string) (slog.Level, error) {
	switch strings.ToLower(strings.TrimSpace(s)) {
	case "trace":
		return LevelTrace, nil
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn", "warning":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	case "off", "none":
		return LevelOff, nil
	}
	return 0, fmt.Errorf("unknown level %q: one of trace, debug, info, warn, error, off", s)
}

func levelName(l slog.Level) string {
	switch {
	case l < slog.LevelDebug:
		return "trace"
	case l < slog.LevelInfo:
		return "debug"
	case l < slog.LevelWarn:
		return "info"
	case l < slog.LevelError:
		return "warn"
	case l < LevelOff:
		return "error"
	}
	return "off"
}
