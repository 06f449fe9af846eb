package redirect

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// ObstacleError reports programs of others that let none of ours be attached.
type ObstacleError struct {
	Cgroup   string   // where they are: the directory that was tried, or one above
	Programs []string // by name and number
	Err      error
}

func (e *ObstacleError) Error() string {
	return fmt.Sprintf("cgroup %s has %s, attached without BPF_F_ALLOW_MULTI: detach it, have it attached with that flag, or choose --redirect=nftables: %v",
		e.Cgroup, strings.Join(e.Programs, ", "), e.Err)
}

func (e *ObstacleError) Unwrap() error { return e.Err }

// explainAttach finds out who keeps a cgroup to himself. A program attached without a
// link and without flags allows no other one there nor below; with
// BPF_F_ALLOW_OVERRIDE none beside it. Nothing is looked for unless attaching failed.
func explainAttach(dir string, at ebpf.AttachType, err error) error {
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	for ; onCgroup2(dir); dir = filepath.Dir(dir) {
		found, qerr := alone(dir, at)
		if qerr != nil {
			return err
		}
		if len(found) > 0 {
			return &ObstacleError{Cgroup: dir, Programs: found, Err: err}
		}
	}
	return err
}

func onCgroup2(dir string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(dir, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC
}

// alone names the programs of dir that are attached without a link.
func alone(dir string, at ebpf.AttachType) ([]string, error) {
	programs, err := programsOf(dir, at, 0)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, p := range programs {
		if _, linked := p.LinkID(); linked {
			continue
		}
		name, err := programName(p.ID)
		if err != nil {
			return nil, err
		}
		found = append(found, fmt.Sprintf("program %s (%d)", name, p.ID))
	}
	return found, nil
}

func programsOf(dir string, at ebpf.AttachType, flags uint32) ([]link.AttachedProgram, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	defer f.Close()
	q, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: at, QueryFlags: flags})
	if err != nil {
		return nil, fmt.Errorf("list programs of %s for %v: %w", dir, at, err)
	}
	return q.Programs, nil
}

// Obstacles names the programs of others that a pod's connect or query meets
// before ours. Service translators (Cilium's, Calico's) are such: what they
// rewrote reaches the mesh as an endpoint's address instead of the service's.
//
// The kernel runs a cgroup's own programs before its parents', and those of one
// cgroup in the order they were attached in; so a translator above the pods' root
// is none. One that was attached there with BPF_F_ALLOW_OVERRIDE is named because
// ours take its place: pods are without it.
func (h *Hooks) Obstacles() ([]string, error) {
	ours, err := ids(h.root, h.proxy)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, at := range []ebpf.AttachType{
		ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg,
	} {
		effective, err := programsOf(h.cfg.CgroupRoot, at, unix.BPF_F_QUERY_EFFECTIVE)
		if err != nil {
			return nil, err
		}
		in := map[ebpf.ProgramID]bool{}
		before := true
		for _, p := range effective {
			in[p.ID] = true
			if before = before && !ours[p.ID]; !before {
				continue
			}
			name, err := programName(p.ID)
			if err != nil {
				return nil, err
			}
			found = append(found, fmt.Sprintf("%v: program %s (%d) runs before the mesh's", at, name, p.ID))
		}
		for dir := filepath.Dir(h.cfg.CgroupRoot); onCgroup2(dir); dir = filepath.Dir(dir) {
			above, err := programsOf(dir, at, 0)
			if err != nil {
				return nil, err
			}
			for _, p := range above {
				if in[p.ID] {
					continue
				}
				name, err := programName(p.ID)
				if err != nil {
					return nil, err
				}
				found = append(found, fmt.Sprintf("%v: program %s (%d) of %s does not run for pods: it allows to be overridden, and the mesh's does", at, name, p.ID, dir))
			}
		}
	}
	return found, nil
}

// PodObstacles names the programs of others that decide about ns's packets and
// connections beside ours, or in the place of ours.
func (h *Hooks) PodObstacles(ns *netns.NS) ([]string, error) {
	p, err := inspect(ns)
	if err != nil {
		return nil, err
	}
	pins := h.path(podsDir, strconv.FormatUint(p.cookie, 10))
	var found []string
	var q *link.QueryResult
	cerr := ns.Control(func(fd int) { q, err = link.QueryPrograms(link.QueryOptions{Target: fd, Attach: ebpf.AttachSkLookup}) })
	if err := errors.Join(cerr, err); err != nil {
		return nil, fmt.Errorf("list sk_lookup programs: %w", err)
	}
	mine, err := pinned(filepath.Join(pins, "lookup"))
	if err != nil {
		return nil, err
	}
	for _, o := range q.Programs {
		if o.ID == mine {
			continue
		}
		name, err := programName(o.ID)
		if err != nil {
			return nil, err
		}
		found = append(found, fmt.Sprintf("sk_lookup: program %s (%d) may give the pod's connections to others than the proxy", name, o.ID))
	}
	for _, l := range p.links {
		index, name := l.Attrs().Index, l.Attrs().Name
		ahead, err := aheadOf(filepath.Join(pins, gatePin(index)), ns, index, ebpf.AttachTCXEgress)
		if err != nil {
			return nil, err
		}
		for _, o := range ahead {
			found = append(found, fmt.Sprintf("%s in the pod: %s runs before the mesh's gate and may let packets pass it", name, o))
		}
		peer, err := h.peer(p, l)
		if err != nil || peer == 0 {
			return found, err
		}
		if ahead, err = aheadOf(filepath.Join(pins, hostPin(index)), h.cfg.Node, peer, ebpf.AttachTCXIngress); err != nil {
			return nil, err
		}
		for _, o := range ahead {
			found = append(found, fmt.Sprintf("the node's end of %s: %s runs before the mesh's gate and may let packets pass it", name, o))
		}
	}
	return found, nil
}

// aheadOf names the programs of an interface that run before the one pinned at pin.
func aheadOf(pin string, ns *netns.NS, index int, at ebpf.AttachType) ([]string, error) {
	mine, err := pinned(pin)
	if err != nil {
		return nil, err
	}
	var q *link.QueryResult
	err = ns.Do(func() (err error) {
		q, err = link.QueryPrograms(link.QueryOptions{Target: index, Attach: at})
		return err
	})
	if errors.Is(err, ebpf.ErrNotSupported) {
		return nil, nil // no TCX: others are in a chain of their own
	}
	if err != nil {
		return nil, fmt.Errorf("list programs of interface %d: %w", index, err)
	}
	var found []string
	for _, p := range q.Programs {
		if p.ID == mine {
			break
		}
		name, err := programName(p.ID)
		if err != nil {
			return nil, err
		}
		found = append(found, fmt.Sprintf("program %s (%d)", name, p.ID))
	}
	return found, nil
}

// pinned is the program of a pinned link; 0 if there is none.
func pinned(pin string) (ebpf.ProgramID, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	} else if err != nil {
		return 0, fmt.Errorf("open pinned link: %w", err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("inspect pinned link: %w", err)
	}
	return info.Program, nil
}

func ids(sets ...programs) (map[ebpf.ProgramID]bool, error) {
	out := map[ebpf.ProgramID]bool{}
	for _, set := range sets {
		for _, p := range set {
			info, err := p.Info()
			if err != nil {
				return nil, fmt.Errorf("inspect programs: %w", err)
			}
			id, _ := info.ID()
			out[id] = true
		}
	}
	return out, nil
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
