package redirect_test

import (
	"encoding/binary"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// translator does at connect what service translators do: one address for another.
func translator(t *testing.T, cgroup string, from, to netip.Addr) {
	t.Helper()
	const userIP4 = 4 // offset in struct bpf_sock_addr
	word := func(a netip.Addr) int32 { return int32(binary.NativeEndian.Uint32(a.AsSlice())) }
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "translator", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, userIP4, asm.Word),
			asm.JNE.Imm32(asm.R2, word(from), "out"),
			asm.Mov.Imm(asm.R3, word(to)),
			asm.StoreMem(asm.R1, userIP4, asm.R3, asm.Word),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("out"),
			asm.Return(),
		},
	})
	check(t, err)
	t.Cleanup(func() { p.Close() })
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupInet4Connect, Program: p})
	check(t, err)
	t.Cleanup(func() { l.Close() })
}

func TestHooksBesideAServiceTranslator(t *testing.T) {
	vip := netip.MustParseAddr("10.96.7.7")
	const untouched, translated = "15001 10.96.7.7:8080 10.8.0.2", "15001 10.9.0.2:8080 10.8.0.2"
	for _, tc := range []struct {
		name          string
		before, after bool // relative to when ours are attached
		above         bool
		line          string
		obstacles     int
	}{
		{name: "above the root, attached before", before: true, above: true, line: untouched},
		{name: "above the root, attached after", after: true, above: true, line: untouched},
		{name: "at the root, attached after", after: true, line: untouched},
		{name: "at the root, attached before", before: true, line: translated, obstacles: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := quietStage(t)
			where := s.app.Path
			if tc.above {
				where = filepath.Dir(where)
			}
			if tc.before {
				translator(t, where, vip, clientV4)
			}
			s.open(t)
			t.Cleanup(func() { check(t, s.hooks.Uninstall(), s.hooks.Close()) })
			if tc.after {
				translator(t, where, vip, clientV4)
			}
			s.listenProxy(t)
			s.enrol(t)
			c, err := connect(s.app, s.pod.NS, netip.AddrPortFrom(vip, 8080), nil)
			if err != nil || c.line != tc.line {
				t.Errorf("connection to %v was answered %q, %v, want %q", vip, c.line, err, tc.line)
			}
			found, err := s.hooks.Obstacles()
			check(t, err)
			if len(found) != tc.obstacles || tc.obstacles == 1 && !strings.Contains(found[0], "translator") {
				t.Errorf("obstacles are %q, want %d", found, tc.obstacles)
			}
		})
	}
}
