package redirect

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Obstacles names the programs of others that a pod's connect or query meets
// before ours. Service translators (Cilium's, Calico's) are such: what they
// rewrote reaches the mesh as an endpoint's address instead of the service's.
//
// The kernel runs a cgroup's own programs before its parents', and those of one
// cgroup in the order they were attached in; so a translator above the pods' root
// is none.
func (h *Hooks) Obstacles() ([]string, error) {
	root, err := os.Open(h.cfg.CgroupRoot)
	if err != nil {
		return nil, fmt.Errorf("open cgroup root: %w", err)
	}
	defer root.Close()
	ours := map[ebpf.ProgramID]bool{}
	for _, set := range []programs{h.root, h.proxy} {
		for _, p := range set {
			info, err := p.Info()
			if err != nil {
				return nil, fmt.Errorf("inspect programs: %w", err)
			}
			id, _ := info.ID()
			ours[id] = true
		}
	}
	var found []string
	for _, at := range []ebpf.AttachType{
		ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg,
	} {
		q, err := link.QueryPrograms(link.QueryOptions{Target: int(root.Fd()), Attach: at, QueryFlags: unix.BPF_F_QUERY_EFFECTIVE})
		if err != nil {
			return nil, fmt.Errorf("list programs for %v: %w", at, err)
		}
		for _, p := range q.Programs {
			if ours[p.ID] {
				break
			}
			name, err := programName(p.ID)
			if err != nil {
				return nil, err
			}
			found = append(found, fmt.Sprintf("%v: program %s (%d) runs before the mesh's", at, name, p.ID))
		}
	}
	return found, nil
}

func programName(id ebpf.ProgramID) (string, error) {
	p, err := ebpf.NewProgramFromID(id)
	if errors.Is(err, os.ErrNotExist) {
		return "that is gone", nil
	} else if err != nil {
		return "", fmt.Errorf("open program %d: %w", id, err)
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return "", fmt.Errorf("inspect program %d: %w", id, err)
	}
	return info.Name, nil
}
