package handoff

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Peer is the process at the other end, as the kernel saw it connect (SO_PEERCRED).
type Peer struct {
	PID int // 0 if it is in a PID namespace we cannot see into
	UID uint32
	GID uint32
}

// PeerOf asks who made a connection.
func PeerOf(c *net.UnixConn) (Peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return Peer{}, fmt.Errorf("ask who the proxy is: %w", err)
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil {
		err = cerr
	}
	if err != nil {
		return Peer{}, fmt.Errorf("ask who the proxy is: %w", err)
	}
	return Peer{PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid}, nil
}

// Cgroup returns the process's cgroup2 path below the hierarchy's root.
func (p Peer) Cgroup() (string, error) {
	if p.PID == 0 {
		return "", fmt.Errorf("find the proxy's cgroup: its process is in a PID namespace out of sight")
	}
	data, err := os.ReadFile("/proc/" + strconv.Itoa(p.PID) + "/cgroup")
	if err != nil {
		return "", fmt.Errorf("find the proxy's cgroup: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		// cgroups(7): the unified hierarchy's line is "0::PATH".
		if path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			return path, nil
		}
	}
	return "", fmt.Errorf("find the proxy's cgroup: process %d is in no cgroup2 hierarchy", p.PID)
}
