package handoff

import (
	"errors"
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

// Caller is a Peer while it is being asked about.
type Caller struct {
	Peer
	conn *net.UnixConn
	pid  *os.File // pidfd; nil before Linux 6.5
}

// callerOf holds on to who made a connection.
func callerOf(c *net.UnixConn) (*Caller, error) {
	p, err := PeerOf(c)
	if err != nil {
		return nil, err
	}
	cl := &Caller{Peer: p, conn: c}
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { // fails only when closed; Alive says so
			// socket(7). An older kernel, or a process that has ended, has none.
			if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD); err == nil {
				cl.pid = os.NewFile(uintptr(n), "pidfd")
			}
		})
	}
	return cl, nil
}

func (c *Caller) close() {
	if c.pid != nil {
		_ = c.pid.Close() // only ever asked
	}
}

// errEnded is a process that is no more: its number may be another's.
var errEnded = errors.New("the process that connected has ended")

// Alive reports that the process has not ended since it connected, so that what
// was read of it by its number until now was of no other. Before Linux 6.5 its end
// of the connection has to answer for it.
func (c *Caller) Alive() error {
	if c.conn == nil {
		return nil // nobody connected: a test
	}
	if c.pid != nil {
		if err := unix.PidfdSendSignal(int(c.pid.Fd()), 0, nil, 0); err != nil {
			return fmt.Errorf("process %d: %w", c.PID, errEnded)
		}
		return nil
	}
	raw, err := c.conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("ask whether process %d is there: %w", c.PID, err)
	}
	ended := true
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, perr := unix.Poll(p, 0)
		ended = perr != nil || n > 0
	})
	if err != nil || ended {
		return fmt.Errorf("process %d: %w", c.PID, errEnded)
	}
	return nil
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
