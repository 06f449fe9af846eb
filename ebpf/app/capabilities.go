package app

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// capability is a right that the agent needs, and what for.
type capability struct {
	bit  uint
	name string
	why  string
	kind string // the redirector that needs it; "": both
}

// capabilities are all the agent needs as root; TestLeastCapabilities runs it with
// these alone. A node that changes its redirector needs those of both until all
// pods have changed over.
var capabilities = []capability{
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", "rules, routes and programs in pods' network namespaces", ""},
	// It includes CAP_BPF and CAP_PERFMON, which are enough to load programs.
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "entering pods' network namespaces, loading programs", ""},
	{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE", "seeing who shares the proxy's cgroup; nftables alone does without, and then knows the proxy by its mark", ""},
}

func (c capability) String() string { return c.name + " (" + c.why + ")" }

// missing returns those of kind that this process lacks.
func missing(kind string) ([]string, error) {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil, fmt.Errorf("read own capabilities: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		// proc_pid_status(5)
		hex, ok := strings.CutPrefix(line, "CapEff:")
		if !ok {
			continue
		}
		have, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		if err != nil {
			return nil, fmt.Errorf("read own capabilities: %w", err)
		}
		var names []string
		for _, c := range capabilities {
			if (c.kind == "" || c.kind == kind) && have&(1<<c.bit) == 0 {
				names = append(names, c.String())
			}
		}
		return names, nil
	}
	return nil, fmt.Errorf("read own capabilities: /proc/self/status does not tell them")
}

// capabilityList has a line for each.
func capabilityList() string {
	var b strings.Builder
	for _, c := range capabilities {
		fmt.Fprintf(&b, "  %-15s %s", c.name, c.why)
		if c.kind != "" {
			fmt.Fprintf(&b, " (--redirect=%s)", c.kind)
		}
		b.WriteByte('\n')
	}
	return b.String()
}
