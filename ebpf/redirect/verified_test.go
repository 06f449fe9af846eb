package redirect_test

import (
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// TestVerifiedInstructions bounds what the kernel goes through for each pod before it
// accepts the pod's programs, which is most of an enrolment's CPU time. Other kernels
// count a little otherwise; a gate that is followed into every order of headers is
// beyond it by far (18000).
func TestVerifiedInstructions(t *testing.T) {
	s := newStage(t)
	s.enrol(t)
	const most = 4000
	n := 0
	for _, pattern := range []string{"lookup", "gate-*"} {
		pins, err := filepath.Glob(filepath.Join(s.cfg.Dir, "pods", "*", pattern))
		check(t, err)
		for _, pin := range pins {
			l, err := link.LoadPinnedLink(pin, nil)
			check(t, err)
			info, err := l.Info()
			check(t, err, l.Close())
			p, err := ebpf.NewProgramFromID(info.Program)
			check(t, err)
			about, err := p.Info()
			check(t, err, p.Close())
			verified, ok := about.VerifiedInstructions()
			if !ok {
				t.Skip("this kernel does not tell (Linux 5.16)")
			}
			n++
			if t.Logf("%s: %d", about.Name, verified); verified > most {
				t.Errorf("%s: the kernel verified %d instructions, want %d at most", about.Name, verified, most)
			}
		}
	}
	if n < 2 {
		t.Errorf("looked at %d programs", n)
	}
}
