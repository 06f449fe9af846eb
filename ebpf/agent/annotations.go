package agent

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// Annotations of pods, and of namespaces for their pods that do not say otherwise.
const (
	annotationOnEnrol         = "ambit.dev/on-enrol"
	annotationExcludeOutbound = "ambit.dev/exclude-outbound-ports"
	annotationExcludeInbound  = "ambit.dev/exclude-inbound-ports"
	annotationAccelerate      = "ambit.dev/accelerate"
)

// annotate reads them. A value that cannot be read counts as none, and the pod's
// status says so: a slip in it must neither open a pod nor take it out of the mesh.
func (pod *Pod) annotate(p *corev1.Pod, ns *corev1.Namespace) {
	var notes []string
	read := func(name, instead string, parse func(value string) error) {
		value, object := annotation(p, ns, name)
		if value == "" {
			return
		}
		if err := parse(value); err != nil {
			notes = append(notes, fmt.Sprintf("%s: annotation %s=%q: %v; until it is corrected %s", object, name, value, err, instead))
		}
	}
	read(annotationOnEnrol, "keep is in force", func(v string) (err error) {
		pod.OnEnrol, err = parseOnEnrol(v)
		return err
	})
	read(annotationExcludeOutbound, "no port is excluded", func(v string) (err error) {
		pod.ExcludeOutbound, err = redirect.ParsePorts(v)
		return err
	})
	read(annotationExcludeInbound, "no port is excluded", func(v string) (err error) {
		pod.ExcludeInbound, err = redirect.ParsePorts(v)
		return err
	})
	read(annotationAccelerate, "the pod is not accelerated", func(v string) (err error) {
		if pod.Accelerate, err = strconv.ParseBool(v); err != nil {
			return errors.New("want true or false")
		}
		return nil
	})
	pod.Notes = strings.Join(notes, "; ")
}

func (pod *Pod) note(s string) {
	if pod.Notes != "" {
		s = pod.Notes + "; " + s
	}
	pod.Notes = s
}

// reason is what a pod's status gives as such while all is well.
func (pod *Pod) reason() string {
	if pod.Notes == "" {
		return pod.Why
	}
	return pod.Why + "; " + pod.Notes
}

// annotation is the pod's value, or else its namespace's, and whose it is.
func annotation(p *corev1.Pod, ns *corev1.Namespace, name string) (value, object string) {
	if v, ok := p.Annotations[name]; ok {
		return v, "pod " + p.Namespace + "/" + p.Name
	}
	if ns == nil {
		return "", ""
	}
	return ns.Annotations[name], "namespace " + ns.Name
}

// OnEnrol is what becomes of connections that a pod had before it was enrolled:
// the zero OnEnrol keeps them.
type OnEnrol struct {
	Reset bool          // they end
	After time.Duration // so long after the enrolment
}

const (
	onEnrolKeep  = "keep"
	onEnrolReset = "reset"
	onEnrolDrain = "drain="
)

func parseOnEnrol(v string) (OnEnrol, error) {
	v = strings.TrimSpace(v)
	after, drain := strings.CutPrefix(v, onEnrolDrain)
	switch {
	case v == onEnrolKeep:
		return OnEnrol{}, nil
	case v == onEnrolReset:
		return OnEnrol{Reset: true}, nil
	case !drain:
		return OnEnrol{}, fmt.Errorf("want keep, reset or drain=DURATION (drain=90s)")
	}
	d, err := time.ParseDuration(after)
	if err != nil || d <= 0 {
		return OnEnrol{}, fmt.Errorf("%q is no duration: want drain=90s, drain=10m", after)
	}
	return OnEnrol{Reset: true, After: d}, nil
}

func (o OnEnrol) String() string {
	switch {
	case !o.Reset:
		return onEnrolKeep
	case o.After == 0:
		return onEnrolReset
	}
	return onEnrolDrain + o.After.String()
}
