package flow

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strconv"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
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

// FlagError gives an error its response flag.
type FlagError struct {
	Flag Flag
	Err  error
}

func (e *FlagError) Error() string { return e.Err.Error() }
func (e *FlagError) Unwrap() error { return e.Err }

// Flagged wraps err with a flag.
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
	return FlagNone
}

func (c *Conn) logEnd(err error) {
	level, msg := slog.LevelInfo, "connection complete"
	switch {
	case err != nil && !c.opened:
		level, msg = slog.LevelWarn, "connection failed"
	case err != nil:
		level = slog.LevelError
	}
	ctx := context.Background()
	if !c.t.log.Enabled(ctx, level) {
		return
	}
	attrs := c.attrs(true)
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
		if d, ok := errors.AsType[*DenyError](err); ok {
			attrs = append(attrs, slog.String("why", d.Why()))
		}
	}
	c.t.log.LogAttrs(ctx, level, msg, attrs...)
}

// attrs are the reference's keys in the reference's order, then ours.
func (c *Conn) attrs(final bool) []slog.Attr {
	r := &c.rec
	a := make([]slog.Attr, 0, 24)
	str := func(k, v string) {
		if v != "" {
			a = append(a, slog.String(k, v))
		}
	}
	if r.SrcAddr.IsValid() {
		a = append(a, slog.Any("src.addr", r.SrcAddr))
	}
	if w := r.Src; w != nil {
		str("src.workload", w.Name)
		str("src.namespace", w.Namespace)
	}
	if r.mutualTLS() {
		str("src.identity", r.SrcID.String())
	}
	if w := r.Src; w != nil {
		str("src.cluster", w.ClusterID)
	}
	if r.DstAddr.IsValid() {
		a = append(a, slog.Any("dst.addr", r.DstAddr))
	}
	if ap, err := netip.ParseAddrPort(r.HBONEAddr); err == nil {
		a = append(a, slog.Any("dst.hbone_addr", ap))
	} else {
		str("dst.hbone_addr", r.HBONEAddr)
	}
	str("dst.service", r.Service)
	if w := r.Dst; w != nil {
		str("dst.workload", w.Name)
		str("dst.namespace", w.Namespace)
	}
	if r.mutualTLS() {
		str("dst.identity", c.dstIdentity().String())
	}
	if w := r.Dst; w != nil {
		str("dst.cluster", w.ClusterID)
	}
	a = append(a, slog.String("direction", string(r.Direction)))
	if final && c.opened {
		a = append(a,
			slog.Uint64("bytes_sent", c.Stats.Received.Load()),
			slog.Uint64("bytes_recv", c.Stats.Sent.Load()),
			slog.String("duration", strconv.FormatInt(time.Since(c.started).Milliseconds(), 10)+"ms"))
	}
	str("transport", string(r.Transport))
	if c.id != 0 {
		a = append(a, slog.Uint64("conn_id", c.id))
	}
	str("trace_id", c.trace.String())
	if final {
		c.mu.Lock()
		dry := c.verdict.DryRun
		c.mu.Unlock()
		str("dry_run", dry)
	}
	return a
}

// dstIdentity is what the other end proved, and what was expected before.
func (c *Conn) dstIdentity() identity.ID {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.peer.IsZero() {
		return c.peer
	}
	return c.rec.DstID
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
		c.mu.Lock()
		if c.subject != nil {
			l.Why, l.Generation = c.verdict.Why(), c.generation
		}
		c.mu.Unlock()
		out = append(out, l)
	}
	return out
}
