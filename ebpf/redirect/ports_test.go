package redirect_test

import (
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

func TestParsePorts(t *testing.T) {
	many := strings.Repeat("1,3,5,7,9,11,13,15,", 1) + "17,19,21,23,25,27,29,31"
	for _, tc := range []struct{ in, want, err string }{
		{in: "", want: ""},
		{in: " , ", want: ""},
		{in: "80", want: "80"},
		{in: "443, 80", want: "80,443"},
		{in: "8000-8099,80", want: "80,8000-8099"},
		{in: "80,81,82-90,85-95,97", want: "80-95,97"},
		{in: "65535,1", want: "1,65535"},
		{in: "100-100", want: "100"},
		{in: many, want: many},
		{in: many + ",33", err: "more than 16"},
		{in: "0", err: "no port"},
		{in: "65536", err: "no port"},
		{in: "http", err: "no port"},
		{in: "-80", err: "no port"},
		{in: "80-", err: "no port"},
		{in: "1-2-3", err: "no port"},
		{in: "90-80", err: "ends before"},
		{in: "15008", err: "15008"},
		{in: "15000-15002", err: "15001"},
		{in: "1-65535", err: "15001"},
	} {
		got, err := redirect.ParsePorts(tc.in)
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%q: %q, %v, want an error with %q", tc.in, got, err, tc.err)
			}
			continue
		}
		if err != nil || string(got) != tc.want {
			t.Errorf("%q: %q, %v, want %q", tc.in, got, err, tc.want)
		}
	}
}

func TestPortsHas(t *testing.T) {
	p, err := redirect.ParsePorts("80,8000-8099")
	check(t, err)
	for port, want := range map[uint16]bool{79: false, 80: true, 81: false, 7999: false, 8000: true, 8050: true, 8099: true, 8100: false} {
		if p.Has(port) != want {
			t.Errorf("port %d: %t, want %t", port, p.Has(port), want)
		}
	}
	if redirect.Ports("").Has(80) {
		t.Error("the empty set has a port")
	}
}

func FuzzParsePorts(f *testing.F) {
	for _, s := range []string{"", "80", "80-90,100", "15008", "1-14999"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := redirect.ParsePorts(s)
		if err != nil {
			return
		}
		again, err := redirect.ParsePorts(string(p))
		if err != nil || again != p || len(p.Ranges()) > redirect.MaxPortRanges {
			t.Errorf("%q became %q, and that %q, %v", s, p, again, err)
		}
		if p.Has(redirect.PortHBONE) {
			t.Errorf("%q leaves the proxy's port out", s)
		}
	})
}
