//go:build !race

package record

import "testing"

func TestSealOpenAllocs(t *testing.T) {
	in, out := pair(t, bothSuites[0])
	p, dst := make([]byte, MaxPlaintext, MaxPlaintext+1), make([]byte, 0, MaxRecord)
	if n := testing.AllocsPerRun(100, func() {
		b, err := out.Seal(dst, p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := in.Open(b); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations per record", n)
	}
}
