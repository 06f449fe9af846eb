package lease

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	wire "github.com/ambit-mesh/ambit/xds/api/lease"
)

// maxMessage bounds a packet: a Grant with all its targets is a third of it.
const maxMessage = 1024

// ProtocolError reports a peer that does not follow the protocol.
type ProtocolError struct{ Reason string }

func (e *ProtocolError) Error() string { return "lease protocol: " + e.Reason }

func write(c *net.UnixConn, m proto.Message) error {
	data, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	if len(data) > maxMessage {
		return fmt.Errorf("encode: message has %d bytes, at most %d", len(data), maxMessage)
	}
	_, err = c.Write(data)
	return err
}

// read takes one packet; buf has maxMessage bytes. A packet without a byte is the
// peer's end.
func read(c *net.UnixConn, buf []byte, m proto.Message) error {
	n, _, flags, _, err := c.ReadMsgUnix(buf, nil)
	switch {
	case err != nil:
		return err
	case flags&unix.MSG_TRUNC != 0:
		return &ProtocolError{fmt.Sprintf("message longer than %d bytes", maxMessage)}
	case n == 0:
		return io.EOF
	}
	if err := proto.Unmarshal(buf[:n], m); err != nil {
		return &ProtocolError{fmt.Sprintf("message cannot be decoded: %v", err)}
	}
	return nil
}

func endpoint(a netip.AddrPort) *wire.Endpoint {
	return &wire.Endpoint{Address: a.Addr().AsSlice(), Port: uint32(a.Port())}
}

func addrPort(e *wire.Endpoint) (netip.AddrPort, error) {
	a, ok := netip.AddrFromSlice(e.GetAddress())
	if !ok || e.GetPort() > 65535 {
		return netip.AddrPort{}, &ProtocolError{fmt.Sprintf("address of %d bytes, port %d", len(e.GetAddress()), e.GetPort())}
	}
	return netip.AddrPortFrom(a, uint16(e.GetPort())), nil
}

func (g Grant) message() *wire.Request {
	m := &wire.Grant{Netns: g.Key.NetNS, To: endpoint(g.Key.Addr), Cut: g.Cut}
	for _, t := range g.Targets {
		m.Targets = append(m.Targets, &wire.Target{Netns: t.NetNS, To: endpoint(t.Addr), Share: t.Share})
	}
	return &wire.Request{Payload: &wire.Request_Grant{Grant: m}}
}

func grantOf(m *wire.Grant) (g Grant, err error) {
	g.Key.NetNS, g.Cut = m.GetNetns(), m.GetCut()
	if g.Key.Addr, err = addrPort(m.GetTo()); err != nil {
		return Grant{}, err
	}
	for _, t := range m.GetTargets() {
		to, err := addrPort(t.GetTo())
		if err != nil {
			return Grant{}, err
		}
		g.Targets = append(g.Targets, Target{NetNS: t.GetNetns(), Addr: to, Share: t.GetShare()})
	}
	return g, nil
}

func (o Opened) message() *wire.Event {
	return &wire.Event{Payload: &wire.Event_Opened{Opened: &wire.Opened{
		Connection: o.Conn, Netns: o.Key.NetNS, Asked: endpoint(o.Key.Addr), Target: o.Target,
		Source: endpoint(o.Src), Destination: endpoint(o.Dst), AgeUs: uint64(max(o.Age, 0).Microseconds()),
	}}}
}

func openedOf(m *wire.Opened) (Opened, error) {
	asked, err1 := addrPort(m.GetAsked())
	src, err2 := addrPort(m.GetSource())
	dst, err3 := addrPort(m.GetDestination())
	return Opened{Conn: m.GetConnection(), Key: Key{m.GetNetns(), asked}, Target: m.GetTarget(), Src: src, Dst: dst,
		Age: micros(m.GetAgeUs())}, errors.Join(err1, err2, err3)
}

func (c Closed) message() *wire.Event {
	return &wire.Event{Payload: &wire.Event_Closed{Closed: &wire.Closed{
		Connection: c.Conn, Sent: c.Sent, Received: c.Received, RttUs: uint64(max(c.RTT, 0).Microseconds()),
		Retransmits: c.Retransmits, TookUs: uint64(max(c.Took, 0).Microseconds()), Lost: c.Lost, Failed: c.Failed,
	}}}
}

func closedOf(m *wire.Closed) Closed {
	return Closed{Conn: m.GetConnection(), Sent: m.GetSent(), Received: m.GetReceived(), RTT: micros(m.GetRttUs()),
		Retransmits: m.GetRetransmits(), Took: micros(m.GetTookUs()), Lost: m.GetLost(), Failed: m.GetFailed()}
}

// micros keeps what does not fit from being negative.
func micros(us uint64) time.Duration {
	const limit = uint64(1<<63-1) / uint64(time.Microsecond)
	return time.Duration(min(us, limit)) * time.Microsecond
}
