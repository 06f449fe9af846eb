package redirect

import (
	"errors"
	"time"

	"github.com/cilium/ebpf"

	"github.com/ambit-mesh/ambit/ebpf/bpf"
)

// SetTTL shortens leases for a test.
func (l *Leases) SetTTL(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ttl = d
}

// Older makes c that of another version of this program, with another layout.
func (c *HooksConfig) Older() {
	c.version.layout = bpf.Layout + 1
	c.version.alter = func(cgroup, pod *ebpf.CollectionSpec) {
		for _, spec := range []*ebpf.CollectionSpec{cgroup, pod} {
			spec.Maps[bpf.CgroupMapMeshEnrolled].MaxEntries /= 2
			spec.Maps[bpf.CgroupMapMeshDials].MaxEntries /= 2
		}
	}
}

// Crash has f decide after each lasting step whether the process dies there.
func (c *HooksConfig) Crash(f func(what string) error) { c.version.step = f }

// WithoutTCX makes c that of a kernel without TCX.
func (c *HooksConfig) WithoutTCX() { c.version.noTCX = true }

// AgeAliases makes all servers' aliases ones that nobody has used for long.
func (h *Hooks) AgeAliases() error {
	m := h.maps[bpf.CgroupMapMeshAliases]
	var (
		k bpf.CgroupAlias
		v bpf.CgroupServer
	)
	all := map[bpf.CgroupAlias]bpf.CgroupServer{}
	it := m.Iterate()
	for it.Next(&k, &v) {
		v.Used = 0
		all[k] = v
	}
	for k, v := range all {
		if err := m.Update(k, v, ebpf.UpdateExist); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return it.Err()
}

// Probes counts the connections that are known as the node's own.
func (h *Hooks) Probes() (n int, err error) {
	var f bpf.CgroupFlow
	var until uint64
	it := h.maps[bpf.CgroupMapMeshDials].Iterate()
	for it.Next(&f, &until) {
		if until != 0 {
			n++
		}
	}
	return n, it.Err()
}
