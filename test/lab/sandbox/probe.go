package sandbox

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/test/netlab"
)

// rules uses each nftables feature that the lab and the mesh's redirection need.
const rules = `table inet probe {
  chain nat { type nat hook output priority -100; policy accept; ip daddr 10.0.0.1 tcp dport 80 redirect to :15001; }
  chain mangle { type route hook output priority mangle; policy accept; ct mark 0x111 meta mark set ct mark; }
}
`

// ProbeMain is the probe's run inside its own sandbox: it tries and prints what
// failed as JSON.
func ProbeMain() int {
	needs, noEBPF := []Need{}, "not tried"
	tried := func(what string, err error, help string) bool {
		if err != nil {
			needs = append(needs, Need{what, err.Error(), help})
		}
		return err == nil
	}
	ebpf := func() error {
		if err := netlab.EBPF(); err != nil {
			noEBPF = strings.TrimPrefix(err.Error(), netlab.NoEBPF)
		} else {
			noEBPF = ""
		}
		return nil
	}
	if tried("private mounts and /proc", prepare(ebpf), helpNamespaces()) {
		for _, tool := range []struct{ name, pkg string }{{"ip", "iproute2"}, {"nft", "nftables"}} {
			_, err := exec.LookPath(tool.name)
			tried("the program "+tool.name, err, "sudo apt-get install "+tool.pkg)
		}
	}
	if len(needs) == 0 {
		tried("veth and bridge", run("", "ip", "link", "add", "br0", "type", "bridge"), "modprobe bridge veth")
		tried("veth and bridge", run("", "ip", "link", "add", "a0", "type", "veth", "peer", "name", "b0"), "modprobe bridge veth")
		tried("policy routing", run("", "ip", "rule", "add", "fwmark", "0x111/0xfff", "table", "100"), "a kernel with CONFIG_IP_MULTIPLE_TABLES")
		tried("nftables redirect", run(rules, "nft", "-f", "-"), "modprobe nf_tables nft_redir nft_chain_nat nft_ct")
		tried("transparent sockets", transparent(), "a kernel with CONFIG_NETFILTER_XT_TARGET_TPROXY, or `docker run --privileged ...`")
	}
	_ = json.NewEncoder(os.Stdout).Encode(findings{needs, noEBPF}) // the parent sees an empty answer
	if len(needs) > 0 {
		return 1
	}
	return 0
}

func run(input, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("%s: %s", name, line)
	}
	return nil
}

func transparent() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1); err != nil {
		return fmt.Errorf("IP_TRANSPARENT: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0x111); err != nil {
		return fmt.Errorf("SO_MARK: %w", err)
	}
	return nil
}
