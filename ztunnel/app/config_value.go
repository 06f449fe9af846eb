package app

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

type stringValue struct{ p *string }

func (v stringValue) Set(s string) error { *v.p = s; return nil }
func (v stringValue) String() string     { return *v.p }

// ignored is read elsewhere.
type ignored struct{}

func (ignored) Set(string) error { return nil }
func (ignored) String() string   { return "" }

type parsed[T any] struct {
	p     *T
	parse func(string) (T, error)
}

func (v parsed[T]) Set(s string) error {
	x, err := v.parse(s)
	if err != nil {
		return err
	}
	*v.p = x
	return nil
}

func (v parsed[T]) String() string   { return fmt.Sprint(*v.p) }
func (v parsed[T]) IsBoolFlag() bool { _, ok := any(v.p).(*bool); return ok }

// OrigSrc says whether applications see their clients' addresses.
type OrigSrc string

// The values of OrigSrc. Auto does where transparent sockets are to be had.
const (
	OrigSrcAuto OrigSrc = "auto"
	OrigSrcOn   OrigSrc = "true"
	OrigSrcOff  OrigSrc = "false"
)

func parseOrigSrc(s string) (OrigSrc, error) {
	if s == "" || s == string(OrigSrcAuto) {
		return OrigSrcAuto, nil
	}
	on, err := strconv.ParseBool(s)
	switch {
	case err != nil:
		return "", fmt.Errorf("want true, false or auto")
	case on:
		return OrigSrcOn, nil
	}
	return OrigSrcOff, nil
}

// parseCapture: whatever is not "true" turns capture off, as in the reference.
func parseCapture(s string) (bool, error) { return strings.EqualFold(s, "true"), nil }

// parseDuration also takes bare seconds, as TERMINATION_GRACE_PERIOD_SECONDS does.
func parseDuration(s string) (time.Duration, error) {
	if n, err := strconv.Atoi(s); err == nil {
		return time.Duration(n) * time.Second, nil
	}
	return time.ParseDuration(s)
}

func parseWorkloadRef(s string) (WorkloadRef, error) {
	if s == "" {
		return WorkloadRef{}, nil
	}
	parts := strings.Split(s, "/")
	if len(parts) != 3 || parts[0] == "" || parts[1] == "" || parts[2] == "" {
		return WorkloadRef{}, fmt.Errorf("want namespace/name/serviceaccount")
	}
	return WorkloadRef{parts[0], parts[1], parts[2]}, nil
}

func parseJSON(s string) (v any, err error) {
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		return nil, fmt.Errorf("want JSON: %w", err)
	}
	return v, nil
}
