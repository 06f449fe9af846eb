package redirect

import (
	"log/slog"
	"os"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// migrateSysctl lets the accept queue of a closing listener move to another one
// of the same address and port (SO_REUSEPORT). Linux 5.14.
// https://docs.kernel.org/networking/ip-sysctl.html
const migrateSysctl = "/proc/sys/net/ipv4/tcp_migrate_req"

// migrateQueues makes a rolling restart of the proxy lose no connection that it
// had not accepted yet. Without it the mesh works, and such connections are
// reset: worth a word, not a refusal.
func migrateQueues(ns *netns.NS, log *slog.Logger) {
	err := ns.Do(func() error {
		v, err := os.ReadFile(migrateSysctl)
		if err != nil || len(v) > 0 && v[0] == '1' {
			return err
		}
		return os.WriteFile(migrateSysctl, []byte("1"), 0)
	})
	if err != nil {
		log.Warn("a restart of the proxy will reset connections that it has not accepted yet", "error", err.Error())
	}
}
