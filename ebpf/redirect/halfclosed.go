package redirect

import (
	"os"
	"strconv"
	"strings"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// Conntrack forgets a connection that one side has closed after a minute or two
// of silence, and with it that its addresses are translated: what the other side
// still has to say would go astray, or out in clear text. The proxy's keepalive
// renews what is alive well within the time.
// https://docs.kernel.org/networking/nf_conntrack-sysctl.html
var halfClosedSysctls = []string{
	"/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait",
	"/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_fin_wait",
}

const halfClosedSeconds = 3600

// rememberHalfClosed makes conntrack remember them. Without it the mesh works but
// for such connections: worth a word, not a refusal.
func (d *Dataplane) rememberHalfClosed(ns *netns.NS) {
	err := ns.Do(func() error {
		for _, name := range halfClosedSysctls {
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			if have, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && have >= halfClosedSeconds {
				continue
			}
			if err := os.WriteFile(name, []byte(strconv.Itoa(halfClosedSeconds)), 0); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		d.cfg.Logger.Warn("connections that one side has closed break after a minute of silence", "error", err.Error())
	}
}
