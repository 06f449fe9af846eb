package agent

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// annotationDNS is Istio's: whether a pod's DNS goes through the proxy.
const annotationDNS = "ambient.istio.io/dns-capture"

// wantsDNS is the node's default unless the pod says otherwise; a value that is
// no boolean changes nothing.
func wantsDNS(p *corev1.Pod, byDefault bool) bool {
	if v, err := strconv.ParseBool(p.Annotations[annotationDNS]); err == nil {
		return v
	}
	return byDefault
}

// resolves finds out whether the proxy answers DNS in the pod: a proxy may be
// told not to, or be another project's. Redirecting queries to a port where
// nobody listens would cut the pod off from every name, so the rules come after
// the listener. Once there they stay while a proxy restarts, for queries must not
// leak past it; those are refused for that moment, and clients ask again.
func (w *worker) resolves(p Pod) bool {
	if !p.DNS {
		return false
	}
	ok, err := w.agent.cfg.Resolves(w.ns)
	if err != nil {
		w.log.Warn("DNS is not captured: cannot find out whether the proxy answers it", "err", err)
	}
	return ok && err == nil
}

// ResolverListens looks for a UDP socket on the resolver's port in ns, which is
// where rules lead queries.
func ResolverListens(ns *netns.NS) (bool, error) { return resolverListens(ns, false) }

// ResolverListensToAll looks for one that is bound to no address: programs lead
// queries to an address for each server, and another project's proxy, which hears
// loopback alone, would be deaf to them.
func ResolverListensToAll(ns *netns.NS) (bool, error) { return resolverListens(ns, true) }

func resolverListens(ns *netns.NS, toAll bool) (bool, error) {
	for _, table := range []string{"/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"} {
		var f *os.File
		err := ns.Do(func() (err error) {
			f, err = os.Open(table) // shows the namespace of the thread that opens it
			return err
		})
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without IPv6
		}
		if err != nil {
			if f != nil {
				_ = f.Close() // err says more
			}
			return false, fmt.Errorf("list UDP sockets: %w", err)
		}
		found, err := boundTo(f, redirect.PortDNS, toAll)
		_ = f.Close() // only read
		if found || err != nil {
			return found, err
		}
	}
	return false, nil
}

// boundTo reads the table of proc_net_udp(5): the second field is the local
// address and port in hexadecimal. unspecified wants an address of zeros.
func boundTo(r io.Reader, port uint16, unspecified bool) (bool, error) {
	suffix := fmt.Sprintf(":%04X", port)
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 {
			continue
		}
		addr, ok := strings.CutSuffix(fields[1], suffix)
		if ok && (!unspecified || strings.Trim(addr, "0") == "") {
			return true, nil
		}
	}
	if err := lines.Err(); err != nil {
		return false, fmt.Errorf("list UDP sockets: %w", err)
	}
	return false, nil
}
