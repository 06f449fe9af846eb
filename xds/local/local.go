// Package local reads a description of the mesh from a file in the reference's
// format (LOCAL_XDS_PATH): workloads, services and policies, as a control plane
// would send them.
//
//	YAML ─→ Parse ─→ client.Delta per type, policies first ─→ store.Apply
//
// The file is taken as it is written. Unknown keys are errors, since a mistyped
// policy would otherwise be a missing one, and nothing that makes up an identity
// has a default, unlike on the wire: a workload without a trust domain would be
// somebody else.
//
// Parse is a pure function.
package local

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/client"
)

// maxSize bounds a file: it is a test's or a small host's, not a cluster's.
const maxSize = 16 << 20

type file struct {
	Workloads []localWorkload `yaml:"workloads"`
	Policies  []localPolicy   `yaml:"policies"`
	Services  []localService  `yaml:"services"`
}

// Parse reads a file. Every mistake in it is in the error; there is no delta
// then.
func Parse(b []byte) ([]client.Delta, error) {
	if len(b) > maxSize {
		return nil, fmt.Errorf("local configuration of %d bytes: at most %d", len(b), maxSize)
	}
	var f file
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)
	if err := d.Decode(&f); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("local configuration: %w", err)
	}
	if err := d.Decode(&struct{}{}); !errors.Is(err, io.EOF) {
		return nil, errors.New("local configuration: more than one document")
	}
	policies, addresses := collector{typ: api.AuthorizationType, seen: map[string]bool{}}, collector{typ: api.AddressType, seen: map[string]bool{}}
	for i := range f.Policies {
		p := &f.Policies[i]
		m, err := p.message()
		policies.add("policy", p.Namespace+"/"+p.Name, m, err)
	}
	for i := range f.Services {
		s := &f.Services[i]
		m, err := s.message()
		addresses.add("service", s.Namespace+"/"+s.Hostname, &workload.Address{Type: &workload.Address_Service{Service: m}}, err)
	}
	for i := range f.Workloads {
		w := &f.Workloads[i]
		m, err := w.message()
		addresses.add("workload", w.UID, &workload.Address{Type: &workload.Address_Workload{Workload: m}}, err)
	}
	if err := errors.Join(append(policies.errs, addresses.errs...)...); err != nil {
		return nil, fmt.Errorf("local configuration: %w", err)
	}
	return []client.Delta{{Type: policies.typ, Added: policies.out}, {Type: addresses.typ, Added: addresses.out}}, nil
}

type collector struct {
	typ  string
	seen map[string]bool
	out  []client.Resource
	errs []error
}

func (c *collector) add(kind, name string, m proto.Message, err error) {
	if c.seen[name] {
		err = errors.Join(err, errors.New("is there twice"))
	}
	c.seen[name] = true
	var b []byte
	if err == nil {
		b, err = proto.MarshalOptions{Deterministic: true}.Marshal(m)
	}
	if err != nil {
		c.errs = append(c.errs, fmt.Errorf("%s %q: %w", kind, name, err))
		return
	}
	c.out = append(c.out, client.Resource{Name: name, TypeURL: c.typ, Value: b})
}
