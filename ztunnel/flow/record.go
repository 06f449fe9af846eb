package flow

import (
	"errors"
	"net/netip"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/origin"
)

// Direction is the side of the connection on which this proxy stands.
type Direction string

const (
	Inbound  Direction = "inbound"
	Outbound Direction = "outbound"
)

func (d Direction) reporter() string {
	if d == Inbound {
		return "destination"
	}
	return "source"
}

// Transport is how the bytes cross the network.
type Transport string

const (
	HBONE       Transport = "hbone"
	Plaintext   Transport = "plaintext"   // to or from a mesh workload, without a tunnel
	Passthrough Transport = "passthrough" // to a destination the mesh does not know
	Local       Transport = "local"       // to a pod of the same node, inside the proxy
)

// Record is what the log and the metrics say of a connection.
type Record struct {
	Direction   Direction
	Pod         string // uid of the local pod
	SrcAddr     netip.AddrPort
	DstAddr     netip.AddrPort
	HBONEAddr   string // the CONNECT authority
	Src, Dst    *mesh.Workload
	SrcID       identity.ID // only when proven by mTLS
	DstID       identity.ID
	Service     string // hostname
	ServiceNS   string
	ServiceName string
	Transport   Transport
	Retries     int // on other endpoints, when nothing had been sent
	// Origin is who opened an outbound connection, if the kernel told.
	Origin origin.Origin
}

func (r *Record) mutualTLS() bool { return r.Transport == HBONE }

// Flag is the response_flags label.
type Flag string

const (
	FlagNone          Flag = "-"
	FlagDeny          Flag = "DENY"
	FlagConnect       Flag = "CONNECT"
	FlagTLS           Flag = "TLS_FAILURE"
	FlagH2            Flag = "H2_HANDSHAKE_FAILURE"
	FlagNetworkPolicy Flag = "NETWORK_POLICY"
	FlagIdentity      Flag = "IDENTITY_ERROR"
	FlagCertRevoked   Flag = "CERT_REVOKED"
)

// FlagError gives an error its response flag, and with Failed its reason.
type FlagError struct {
	Flag   Flag
	Reason Reason // "": what the error's type tells
	Err    error
}

func (e *FlagError) Error() string { return e.Err.Error() }
func (e *FlagError) Unwrap() error { return e.Err }

// Flagged wraps err with a flag. Failed says more.
func Flagged(f Flag, err error) error { return &FlagError{Flag: f, Err: err} }

func flagOf(err error) Flag {
	if err == nil {
		return FlagNone
	}
	if _, ok := errors.AsType[*DenyError](err); ok {
		return FlagDeny
	}
	if f, ok := errors.AsType[*FlagError](err); ok {
		return f.Flag
	}
	return reasonOf(err).flag()
}

// Live is one row of the table, for the admin page.
type Live struct {
	ID          uint64    `json:"id"`
	TraceID     string    `json:"traceId"`
	Direction   Direction `json:"direction"`
	Transport   Transport `json:"transport"`
	Src         string    `json:"src"`
	SrcWorkload string    `json:"srcWorkload,omitempty"`
	SrcIdentity string    `json:"srcIdentity,omitempty"`
	Dst         string    `json:"dst"`
	OriginalDst string    `json:"originalDst,omitempty"`
	DstWorkload string    `json:"dstWorkload,omitempty"`
	Why         string    `json:"why,omitempty"`
	Generation  uint64    `json:"generation"`
	BytesSent   uint64    `json:"bytesSent"`
	BytesRecv   uint64    `json:"bytesRecv"`
	Age         string    `json:"age"`

	Pod string `json:"pod"`

	Process   string `json:"process,omitempty"` // that opened it
	PID       uint32 `json:"pid,omitempty"`
	Container string `json:"container,omitempty"`
}

// List describes the connections whose records are complete.
func (t *Table) List() []Live {
	var out []Live
	for _, c := range t.live() {
		if c.series.Load() == nil { // published after the record was complete
			continue
		}
		r := &c.rec
		l := Live{ID: c.id, TraceID: c.trace.String(), Direction: r.Direction, Transport: r.Transport, Src: r.SrcAddr.String(), Dst: r.DstAddr.String(),
			OriginalDst: r.HBONEAddr, Pod: r.Pod, BytesSent: c.Stats.Received.Load(), BytesRecv: c.Stats.Sent.Load(),
			Age: time.Since(c.started).Round(time.Millisecond).String()}
		if r.Src != nil {
			l.SrcWorkload = r.Src.Namespace + "/" + r.Src.Name
		}
		if r.Dst != nil {
			l.DstWorkload = r.Dst.Namespace + "/" + r.Dst.Name
		}
		if r.mutualTLS() {
			l.SrcIdentity = r.SrcID.String()
		}
		l.Process, l.Container = c.t.opener(r.Origin)
		l.PID = r.Origin.PID
		c.mu.Lock()
		if c.subject != nil {
			l.Why, l.Generation = c.verdict.Why(), c.generation
		}
		c.mu.Unlock()
		out = append(out, l)
	}
	return out
}
