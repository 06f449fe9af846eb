package bpf_test

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"testing"

	"github.com/cilium/ebpf/btf"

	"github.com/ambit-mesh/ambit/ebpf/bpf"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// TestContract compares the numbers that both sides write down.
func TestContract(t *testing.T) {
	src, err := os.ReadFile("mesh.h")
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("#define MESH_LAYOUT %d\n", bpf.Layout); !bytes.Contains(src, []byte(want)) {
		t.Errorf("mesh.h lacks %q", want)
	}
	for name, want := range map[string]uint64{
		"PORT_OUTBOUND": redirect.PortOutbound, "PORT_INBOUND": redirect.PortInbound,
		"PORT_HBONE": redirect.PortHBONE, "PORT_DNS": redirect.PortDNS, "MARK_RETURN": redirect.MarkReturn,
	} {
		m := regexp.MustCompile(fmt.Sprintf(`(?m)^\s*%s = (\w+),`, name)).FindSubmatch(src)
		if m == nil {
			t.Errorf("mesh.h has no %s", name)
			continue
		}
		if have, err := strconv.ParseUint(string(m[1]), 0, 64); err != nil || have != want {
			t.Errorf("%s is %s in mesh.h and %d in package redirect", name, m[1], want)
		}
	}
}

// TestPodAsksNoTypes finds no relocation that the kernel's types answer in what is
// loaded once per pod: reading them took 25 ms of CPU for each.
func TestPodAsksNoTypes(t *testing.T) {
	spec, err := bpf.LoadPod()
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range spec.Programs {
		for i := range p.Instructions {
			if r := btf.CORERelocationMetadata(&p.Instructions[i]); r != nil {
				t.Errorf("%s: instruction %d has relocation %v", name, i, r)
			}
		}
	}
}
