// Package handoff passes pods' network namespaces from the node agent to the
// node proxy: the ZDS protocol of Istio ambient, so that either side may be
// another project's.
//
//	agent (Server)                         proxy (Client)
//	                    ◀── ZdsHello ───
//	── Add + netns fd, Keep ... ──▶         one Ack after each
//	── SnapshotSent ──▶                     pods not named are drained
//	── Add, Del ──▶                         one Ack after each
//
// The socket is a unix SOCK_SEQPACKET one: a packet is a protobuf message of at
// most 1024 bytes. Several proxies may be connected during an upgrade: additions
// go to the newest, removals to all.
//
// Server's methods may be called from any goroutine; Client calls its Handler
// from one goroutine, in the order of the messages. The package does not know
// what a pod is to the proxy, nor how the agent found it.
package handoff

import (
	"errors"
	"fmt"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// DrainTime is what both sides agree on without words, and their default: after
// a removal was acknowledged the agent keeps the pod's rules at least this long,
// and the proxy ends the pod's connections at most this long after it got the
// removal. An agent that keeps them shorter cuts connections that still drain.
const DrainTime = 5 * time.Second

// maxMessage bounds a packet. Istio's two sides both read into 1024 bytes.
const maxMessage = 1024

// Pod is what the proxy learns about a pod.
type Pod struct {
	UID            string
	Name           string
	Namespace      string
	ServiceAccount string
	NS             *netns.NS
}

// ErrNoProxy reports that no proxy is connected.
var ErrNoProxy = errors.New("no proxy is connected")

// RejectedError is the proxy's own refusal of a pod, with its text.
type RejectedError struct{ Reason string }

func (e *RejectedError) Error() string { return "proxy refused: " + e.Reason }

// ProtocolError reports a peer that does not follow the protocol. The connection
// it came on is closed.
type ProtocolError struct{ Reason string }

func (e *ProtocolError) Error() string { return "zds protocol: " + e.Reason }

func protocolErrorf(format string, args ...any) error {
	return &ProtocolError{Reason: fmt.Sprintf(format, args...)}
}
