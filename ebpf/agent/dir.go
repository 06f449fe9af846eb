package agent

import (
	"cmp"
	"context"
	"log/slog"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
	"github.com/ambit-mesh/ambit/xds/dir"
)

// DirConfig is a Source over directories of YAML.
type DirConfig struct {
	Dirs     []string
	Node     string   // only pods with this spec.nodeName
	Excluded []string // namespaces never enrolled
	DNS      bool     // capture DNS of pods that do not say otherwise
	// Facts hears before each update what a plugin needs to know that has to decide
	// without the agent; nil: nobody does.
	Facts  func(attach.Facts)
	Logger *slog.Logger
}

// DirSource reads pods and namespaces from directories. It is owned by the
// goroutine that calls Run.
type DirSource struct {
	cfg        DirConfig
	pods       map[dir.Key]*corev1.Pod
	namespaces map[string]*corev1.Namespace
	problems   map[string]bool
}

// NewDirSource returns a source that reads nothing until Run.
func NewDirSource(cfg DirConfig) *DirSource {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &DirSource{
		cfg: cfg, pods: map[dir.Key]*corev1.Pod{}, namespaces: map[string]*corev1.Namespace{}, problems: map[string]bool{},
	}
}

// Run implements Source.
func (s *DirSource) Run(ctx context.Context, update func([]Pod)) error {
	first := true
	return dir.Watch(ctx, s.cfg.Dirs, s.cfg.Logger, func(c dir.Change) {
		s.report(c.Problems)
		if s.apply(c) || first {
			first = false
			pods := s.list()
			if s.cfg.Facts != nil {
				s.cfg.Facts(s.facts(pods))
			}
			update(pods)
		}
	})
}

// apply takes over a change and reports whether it may matter.
func (s *DirSource) apply(c dir.Change) bool {
	relevant := false
	for _, o := range c.Upserts {
		switch v := o.Value.(type) {
		case *corev1.Pod:
			relevant = relevant || v.Spec.NodeName == s.cfg.Node || s.pods[o.Key()] != nil
			delete(s.pods, o.Key())
			if v.Spec.NodeName == s.cfg.Node {
				s.pods[o.Key()] = v
			}
		case *corev1.Namespace:
			s.namespaces[v.Name] = v
			relevant = true
		}
	}
	for _, k := range c.Deletes {
		switch k.Kind {
		case "Pod":
			relevant = relevant || s.pods[k] != nil
			delete(s.pods, k)
		case "Namespace":
			delete(s.namespaces, k.Name)
			relevant = true
		}
	}
	return relevant
}

// report logs each problem with a pod or namespace once; the control plane tells
// of the others.
func (s *DirSource) report(problems []dir.Problem) {
	now := make(map[string]bool, len(problems))
	for _, p := range problems {
		if p.Kind != "" && p.Kind != "Pod" && p.Kind != "Namespace" {
			continue
		}
		text := p.String()
		now[text] = true
		if !s.problems[text] {
			s.cfg.Logger.Warn("object is not in force", "problem", text)
		}
	}
	s.problems = now
}

func (s *DirSource) list() []Pod {
	pods := make([]Pod, 0, len(s.pods))
	for _, p := range s.pods {
		pod := podOf(p, s.namespaces[p.Namespace], s.cfg.Excluded)
		pod.DNS = wantsDNS(p, s.cfg.DNS)
		pods = append(pods, pod)
	}
	// Sorted, so that of two pods with one uid it is always the same that counts.
	slices.SortFunc(pods, func(a, b Pod) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	seen := map[string]bool{}
	return slices.DeleteFunc(pods, func(p Pod) bool {
		if validUID(p.UID) && !seen[p.UID] {
			seen[p.UID] = true
			return false
		}
		s.cfg.Logger.Warn("pod is ignored: its metadata.uid is missing, used twice or not usable", "pod", p.Namespace+"/"+p.Name, "uid", p.UID)
		return true
	})
}
