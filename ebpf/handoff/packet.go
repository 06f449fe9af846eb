package handoff

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/xds/api/zds"
)

// maxFDs is how many descriptors of one packet are looked at. One is right; room
// for more tells "too many" from "cut off by the kernel", which closes the rest itself.
const maxFDs = 4

// packetBuffer is a connection's reading space, reused for each packet.
type packetBuffer struct {
	data []byte
	oob  []byte
}

func newPacketBuffer() *packetBuffer {
	return &packetBuffer{
		data: make([]byte, maxMessage),
		oob:  make([]byte, unix.CmsgSpace(maxFDs*4)),
	}
}

// readRequest reads one packet of the agent's. The caller owns the descriptors.
func (b *packetBuffer) readRequest(c *net.UnixConn) (*zds.WorkloadRequest, []int, error) {
	n, oobn, flags, _, err := c.ReadMsgUnix(b.data, b.oob)
	if err != nil {
		return nil, nil, fmt.Errorf("read: %w", err)
	}
	// Descriptors first: whatever is wrong with the rest, they are ours to close.
	fds, err := parseFDs(b.oob[:oobn])
	if err == nil {
		err = checkPacket(n, oobn, flags)
	}
	req := &zds.WorkloadRequest{}
	if err == nil {
		err = decode(b.data[:n], req)
	}
	if err != nil {
		closeAll(fds)
		return nil, nil, err
	}
	return req, fds, nil
}

// errClosed is a peer's orderly end: an empty packet on a SOCK_SEQPACKET socket.
var errClosed = errors.New("closed by the peer")

func checkPacket(n, oobn, flags int) error {
	switch {
	case flags&unix.MSG_TRUNC != 0:
		return protocolErrorf("message longer than %d bytes", maxMessage)
	case flags&unix.MSG_CTRUNC != 0:
		return protocolErrorf("more descriptors than the message may carry")
	case n == 0 && oobn == 0:
		// Indistinguishable from an empty message, which means nothing anyway.
		return errClosed
	}
	return nil
}

func decode(data []byte, m proto.Message) error {
	if err := proto.Unmarshal(data, m); err != nil {
		return protocolErrorf("message cannot be decoded: %v", err)
	}
	return nil
}

// parseFDs returns the descriptors of all control messages, also with an error.
func parseFDs(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, protocolErrorf("control message cannot be decoded: %v", err)
	}
	var fds []int
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			err = protocolErrorf("control message of another kind")
			continue
		}
		got, perr := unix.ParseUnixRights(&msgs[i])
		if perr != nil {
			err = protocolErrorf("descriptors cannot be decoded: %v", perr)
			continue
		}
		fds = append(fds, got...)
	}
	return fds, err
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd) // only read from; nothing to lose
	}
}

// writeMessage sends m as one packet, with a descriptor if ns is given.
func writeMessage(c *net.UnixConn, m proto.Message, ns *netns.NS) error {
	data, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	if len(data) > maxMessage {
		return fmt.Errorf("encode: message has %d bytes, the protocol allows %d", len(data), maxMessage)
	}
	if ns == nil {
		_, _, err = c.WriteMsgUnix(data, nil, nil)
		return err
	}
	if cerr := ns.Control(func(fd int) {
		_, _, err = c.WriteMsgUnix(data, unix.UnixRights(fd), nil)
	}); cerr != nil {
		return cerr
	}
	return err
}

func response(ack *zds.Ack) *zds.WorkloadResponse {
	// proto3 strings are UTF-8, and a handler's text may hold anything.
	ack.Error = strings.ToValidUTF8(ack.Error, "?")
	// Room for the rest of the message: a long reason is cut, not lost.
	if limit := maxMessage - 16; len(ack.Error) > limit {
		ack.Error = cut(ack.Error, limit)
	}
	return &zds.WorkloadResponse{Payload: &zds.WorkloadResponse_Ack{Ack: ack}}
}

// cut shortens s to at most limit bytes without splitting a character.
func cut(s string, limit int) string {
	for limit > 0 && s[limit]&0xc0 == 0x80 {
		limit--
	}
	return s[:limit]
}

// add hands one pod to the handler. It owns fds.
func (s *session) add(ctx context.Context, add *zds.AddWorkload, fds []int) error {
	if len(fds) != 1 {
		closeAll(fds)
		return protocolErrorf("%d descriptors came with pod %q, want 1", len(fds), add.GetUid())
	}
	if add.GetUid() == "" || add.GetWorkloadInfo() == nil {
		closeAll(fds)
		return protocolErrorf("add without a uid or without workload info")
	}
	ns, err := netns.FromFD(fds[0])
	if err != nil {
		closeAll(fds)
		return protocolErrorf("descriptor of pod %q: %v", add.GetUid(), err)
	}
	// Named even if the handler refuses: the agent has the pod and tries again,
	// so a version of it that is served already must not be drained.
	if !s.synced {
		s.known = append(s.known, add.GetUid())
	}
	info := add.GetWorkloadInfo()
	pod := Pod{
		UID: add.GetUid(), Name: info.GetName(), Namespace: info.GetNamespace(),
		ServiceAccount: info.GetServiceAccount(), NS: ns,
	}
	if err := s.client.cfg.Handler.AddPod(ctx, pod); err != nil {
		_ = ns.Close() // the handler has not taken it
		return &RejectedError{Reason: err.Error()}
	}
	return nil
}
