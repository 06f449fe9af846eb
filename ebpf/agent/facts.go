package agent

import (
	"slices"

	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
)

// facts are what a CNI plugin decides by while no agent runs. A pod whose namespace
// is not known yet is not named: the plugin lets it wait.
func (s *DirSource) facts(pods []Pod) attach.Facts {
	f := attach.Facts{
		Node: s.cfg.Node, Excluded: s.cfg.Excluded,
		Namespaces: make(map[string]attach.Namespace, len(s.namespaces)), Pods: make(map[string]bool, len(pods)),
	}
	for name, ns := range s.namespaces {
		in := ns.Labels[labelMode] == modeAmbient && !slices.Contains(s.cfg.Excluded, name)
		f.Namespaces[name] = attach.Namespace{InMesh: in}
	}
	for _, p := range pods {
		if p.Undecided {
			continue
		}
		f.Pods[p.runtimeUID()] = p.Enrolled
		if ns, known := f.Namespaces[p.Namespace]; known && p.Enrolled && !ns.InMesh {
			ns.Mixed = true
			f.Namespaces[p.Namespace] = ns
		}
	}
	return f
}
