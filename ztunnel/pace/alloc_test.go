//go:build !race

package pace

import "testing"

func TestAllocLook(t *testing.T) {
	looks := newLooker()
	if n := testing.AllocsPerRun(100, func() { looks() }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
