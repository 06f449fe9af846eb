// Package lease is how the node proxy lets connections between pods of its node
// go without it: the proxy, which has authorized one, asks the agent, which tells
// the kernel.
//
//	proxy (Client)                          agent (Server ─▶ Holder: the kernel)
//	  Grant: who, where to, shares  ──▶      the next connects go straight there
//	  Renew, every Interval         ──▶      all of it holds TTL longer
//	  Cut: a connection             ──▶      destroyed
//	                                ◀──      Opened, Closed: each connection
//
// A lease lasts as long as the proxy says so and no longer than TTL: a proxy that
// hangs or dies takes its leases and their connections with it. Namespaces are
// named by their cookies, which both sides can ask the kernel for.
//
// The socket is one of its own beside ZDS, so that neither the reference's agent
// nor its proxy ever meet it; it is for the processes that are the proxy already.
// What either side sends is checked by the other; a packet that cannot be read
// ends the connection, and with it the leases.
package lease

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"time"
)

const (
	// TTL is how long leases outlive the last renewal, and so how long a proxy
	// that is gone can be missed without anybody noticing.
	TTL = 10 * time.Second
	// Interval of renewals: two may be lost.
	Interval = 3 * time.Second
	// MaxTargets of one lease; further ones are reached through the proxy.
	MaxTargets = 4
	// All of the connections.
	All = 1<<32 - 1
)

// Path is the lease socket's, beside that of ZDS.
func Path(zds string) string { return filepath.Join(filepath.Dir(zds), "lease.sock") }

// Key is where a pod wants to go, as its applications say it.
type Key struct {
	NetNS uint64
	Addr  netip.AddrPort
}

// Target is a pod of the same node.
type Target struct {
	NetNS uint64
	Addr  netip.AddrPort
	Share uint32 // of the connections, in 1/2^32; the rest goes to the proxy
}

// Grant makes the targets of a key exactly these. Targets that are no longer
// named take no new connections; Cut also ends those that live.
type Grant struct {
	Key     Key
	Targets []Target
	Cut     bool
}

// Opened is a connection under a lease.
type Opened struct {
	Conn     uint64 // the socket's cookie
	Key      Key
	Target   uint64 // namespace
	Src, Dst netip.AddrPort
	Age      time.Duration
}

// Closed is the end of a connection, or of an attempt; Opened came before.
type Closed struct {
	Conn        uint64
	Sent        uint64 // by who opened it, and acknowledged
	Received    uint64
	RTT         time.Duration
	Retransmits uint32
	Took        time.Duration
	Failed      bool // it never came about
	Lost        bool // how it ended went unseen
}

// Events hears of connections, one call at a time. Calls must not block.
type Events interface {
	Opened(Opened)
	Closed(Closed)
}

// Holder is who has leases put in force. Owners are compared.
type Holder interface {
	Grant(owner Events, g Grant) error
	Renew(owner Events) error
	// Cut destroys a connection of the owner's.
	Cut(owner Events, conn uint64) error
	// Abandon ends all leases of the owner and destroys their connections.
	Abandon(owner Events)
}

// RefusedError is the agent's refusal of a lease.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return "lease refused: " + e.Reason }

// ErrNoAgent reports that no agent that knows leases is connected.
var ErrNoAgent = errors.New("no agent that grants leases is connected")

// Check reports what no Holder can put in force.
func (g Grant) Check() error {
	if len(g.Targets) > MaxTargets {
		return &RefusedError{fmt.Sprintf("%d targets, at most %d", len(g.Targets), MaxTargets)}
	}
	if !g.Key.Addr.IsValid() || g.Key.Addr.Addr().Is4In6() || g.Key.Addr.Port() == 0 || g.Key.NetNS == 0 {
		return &RefusedError{fmt.Sprintf("destination %v is not complete", g.Key.Addr)}
	}
	var sum uint64
	for i, t := range g.Targets {
		if !t.Addr.IsValid() || t.Addr.Addr().Is4In6() || t.Addr.Port() == 0 || t.NetNS == 0 || t.Share == 0 {
			return &RefusedError{fmt.Sprintf("target %v is not complete", t.Addr)}
		}
		if t.Addr.Addr().Is4() != g.Key.Addr.Addr().Is4() {
			return &RefusedError{fmt.Sprintf("target %v is of another family than %v", t.Addr, g.Key.Addr)}
		}
		if t.NetNS == g.Key.NetNS {
			return &RefusedError{"a pod needs no lease for itself"}
		}
		for _, o := range g.Targets[:i] {
			if o.NetNS == t.NetNS && o.Addr == t.Addr {
				return &RefusedError{fmt.Sprintf("target %v is named twice", t.Addr)}
			}
		}
		sum += uint64(t.Share)
	}
	if sum > All {
		return &RefusedError{"shares exceed the whole"}
	}
	return nil
}
