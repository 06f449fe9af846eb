package agent

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// Cleanup takes all pods named in the status directory out of the mesh, for an
// uninstall: no agent may run meanwhile. It goes on after a failure and returns
// all of them.
func Cleanup(status *StatusDir, rules Rules, host interface{ Remove() error }) (int, error) {
	pods, err := status.List()
	errs := []error{err}
	cleaned := 0
	for _, p := range pods {
		// Peers stop first to believe in the pod's proxy.
		if err := errors.Join(status.Remove(p.UID), removeAt(p.NetNS, rules)); err != nil {
			errs = append(errs, fmt.Errorf("clean up pod %s/%s: %w", p.Namespace, p.Name, err))
			continue
		}
		cleaned++
	}
	if host != nil {
		errs = append(errs, host.Remove())
	}
	return cleaned, errors.Join(errs...)
}

func removeAt(path string, rules Rules) error {
	if path == "" {
		return nil
	}
	ns, err := netns.Open(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, netns.ErrNotNetNS) {
		return nil // the rules went with the namespace
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	return rules.Remove(ns)
}
