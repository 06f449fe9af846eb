package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// Detail is a socket with what costs the kernel more to tell.
type Detail struct {
	Socket
	// Sent and Received are bytes that the peer acknowledged and that came from it,
	// where the kernel has them: SYN and FIN may count as one each.
	Sent, Received uint64
	// Storage is what programs keep with the socket, by the map's id.
	Storage map[uint32][]byte
}

// Of include/uapi/linux/inet_diag.h and sock_diag.h.
const (
	reqStorages  = 2 // INET_DIAG_REQ_SK_BPF_STORAGES
	reqMapFD     = 1 // SK_DIAG_BPF_STORAGE_REQ_MAP_FD
	attrInfo     = 2 // INET_DIAG_INFO
	attrStorages = 20
	attrStorage  = 1
	attrMapID    = 2
	attrMapValue = 3

	// Offsets in struct tcp_info, Linux 4.1.
	infoBytesAcked    = 120
	infoBytesReceived = 128
)

// ListDetail returns ns's TCP sockets in one of the states, with what socket
// storage maps, by descriptor, have of each.
func ListDetail(ns *netns.NS, states States, storages ...int) ([]Detail, error) {
	c, err := dial(ns, maxReply)
	if err != nil {
		return nil, err
	}
	defer c.close()
	var all []Detail
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		all, err = c.listDetail(all, family, states, storages)
		if family == unix.AF_INET6 && errors.Is(err, unix.ENOENT) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("list TCP sockets: %w", err)
		}
	}
	return all, nil
}

func (c *conn) listDetail(all []Detail, family uint8, states States, storages []int) ([]Detail, error) {
	req := make([]byte, reqLen)
	req[0], req[1], req[2] = family, unix.IPPROTO_TCP, 1<<(attrInfo-1)
	binary.NativeEndian.PutUint32(req[4:], uint32(states))
	if len(storages) > 0 {
		var maps []byte
		for _, fd := range storages {
			maps = appendAttr(maps, reqMapFD, binary.NativeEndian.AppendUint32(nil, uint32(fd)))
		}
		req = appendAttr(req, reqStorages|unix.NLA_F_NESTED, maps)
	}
	b := make([]byte, headerLen, headerLen+len(req))
	binary.NativeEndian.PutUint32(b[0:], uint32(headerLen+len(req)))
	binary.NativeEndian.PutUint16(b[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	if err := unix.Sendto(c.fd, append(b, req...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return all, fmt.Errorf("sendto: %w", err)
	}
	for {
		n, err := c.receive()
		if err != nil {
			return all, err
		}
		done, err := parseMessages(c.buf[:n], func(body []byte) error {
			d, err := parseDetail(body)
			if err == nil {
				all = append(all, d)
			}
			return err
		})
		if done || err != nil {
			return all, err
		}
	}
}

func appendAttr(b []byte, kind uint16, v []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(v)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, v...)
	return append(b, make([]byte, -len(v)&3)...)
}

// attrs calls f with each attribute of b.
func attrs(b []byte, f func(kind uint16, v []byte) error) error {
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return errMalformed
		}
		if err := f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[4:n]); err != nil {
			return err
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}

func parseDetail(b []byte) (Detail, error) {
	s, err := parseSocket(b)
	if err != nil {
		return Detail{}, err
	}
	d := Detail{Socket: s}
	err = attrs(b[msgLen:], func(kind uint16, v []byte) error {
		switch kind {
		case attrInfo:
			if len(v) >= infoBytesReceived+8 {
				d.Sent = binary.NativeEndian.Uint64(v[infoBytesAcked:])
				d.Received = binary.NativeEndian.Uint64(v[infoBytesReceived:])
			}
		case attrStorages:
			return attrs(v, d.parseStorage)
		}
		return nil
	})
	return d, err
}

func (d *Detail) parseStorage(kind uint16, v []byte) error {
	if kind != attrStorage {
		return nil
	}
	var id uint32
	var value []byte
	err := attrs(v, func(kind uint16, v []byte) error {
		switch {
		case kind == attrMapID && len(v) >= 4:
			id = binary.NativeEndian.Uint32(v)
		case kind == attrMapValue:
			value = append([]byte(nil), v...)
		}
		return nil
	})
	if value != nil {
		if d.Storage == nil {
			d.Storage = map[uint32][]byte{}
		}
		d.Storage[id] = value
	}
	return err
}
