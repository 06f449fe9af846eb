package crd

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TelemetryGroup is the group of Telemetry.
const TelemetryGroup = "telemetry.istio.io"

// Telemetry says what proxies report. Fields of type any are accepted and not
// read.
type Telemetry struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   TelemetrySpec `json:"spec,omitempty"`
	Status Status        `json:"status,omitempty"`
}

// TelemetrySpec is telemetry.istio.io Telemetry.
type TelemetrySpec struct {
	Selector      *Selector        `json:"selector,omitempty"`
	TargetRef     *TargetRef       `json:"targetRef,omitempty"`
	TargetRefs    []*TargetRef     `json:"targetRefs,omitempty"`
	Tracing       []any            `json:"tracing,omitempty"`
	Metrics       []any            `json:"metrics,omitempty"`
	AccessLogging []*AccessLogging `json:"accessLogging,omitempty"`
}

// AccessLogging is one setting of access logs.
type AccessLogging struct {
	Match     *AccessLogMatch     `json:"match,omitempty"`
	Providers []*ExternalProvider `json:"providers,omitempty"`
	Disabled  *bool               `json:"disabled,omitempty"`
	Filter    *AccessLogFilter    `json:"filter,omitempty"`
}

// AccessLogMatch limits a setting to one side of connections.
type AccessLogMatch struct {
	Mode WorkloadMode `json:"mode,omitempty"`
}

// AccessLogFilter chooses the lines by a CEL expression.
type AccessLogFilter struct {
	Expression string `json:"expression,omitempty"`
}

// WorkloadMode is the side of a connection that a workload is on.
type WorkloadMode string

// Values of WorkloadMode; empty is both.
const (
	ModeBoth   WorkloadMode = "CLIENT_AND_SERVER"
	ModeClient WorkloadMode = "CLIENT"
	ModeServer WorkloadMode = "SERVER"
)

// Values implements Enum.
func (WorkloadMode) Values() []string {
	return []string{string(ModeBoth), string(ModeClient), string(ModeServer)}
}

// Validate implements Validator.
func (t *Telemetry) Validate() []Fault {
	var fs faults
	s := &t.Spec
	set := 0
	for _, b := range []bool{s.Selector != nil, s.TargetRef != nil, len(s.TargetRefs) > 0} {
		if b {
			set++
		}
	}
	if set > 1 {
		fs.add("spec", "keep one of them", "only one of selector, targetRef and targetRefs may be set")
	}
	fs.selector("spec.selector", s.Selector)
	if len(s.TargetRefs) > maxTargetRefs {
		fs.add("spec.targetRefs", "", "%d targets, at most %d are allowed", len(s.TargetRefs), maxTargetRefs)
	}
	for i, a := range s.AccessLogging {
		if a.Filter != nil && a.Filter.Expression == "" {
			fs.add(fmt.Sprintf("spec.accessLogging[%d].filter.expression", i), "remove the filter to log everything", "is empty")
		}
		for j, p := range a.Providers {
			if p.Name == "" {
				fs.add(fmt.Sprintf("spec.accessLogging[%d].providers[%d].name", i, j), "name one of meshConfig.extensionProviders", "is missing")
			}
		}
	}
	return fs
}
