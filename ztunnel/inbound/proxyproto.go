package inbound

import (
	"encoding/binary"
	"net/netip"

	"github.com/ambit-mesh/ambit/xds/identity"
)

// tlvPeer is the type of the TLV that carries the peer's SPIFFE id, from the
// range that the protocol leaves to applications
// (https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt, section 2.2.7).
const tlvPeer = 0xD0

// maxProxyHeader is the largest header written here: fixed part, two IPv6
// addresses with ports, and the TLV of the longest SPIFFE id (2048 bytes).
const maxProxyHeader = 16 + 36 + 3 + 2048

// proxySignature begins every PROXY header of version 2.
const proxySignature = "\r\n\r\n\x00\r\nQUIT\n"

// appendProxyHeader appends the PROXY header (version 2, command PROXY, TCP)
// of a connection from src to dst. Both addresses must be of one family, so
// IPv4 is written as IPv4-mapped IPv6 beside IPv6. A zero peer writes no TLV.
func appendProxyHeader(b []byte, src, dst netip.AddrPort, peer identity.ID) []byte {
	const version2Proxy, tcp4, tcp6 = 0x21, 0x11, 0x21
	b = append(b, proxySignature...)
	family := byte(tcp6)
	if src.Addr().Unmap().Is4() && dst.Addr().Unmap().Is4() {
		family = tcp4
	}
	b = append(b, version2Proxy, family, 0, 0)
	start := len(b)
	if family == tcp4 {
		s, d := src.Addr().Unmap().As4(), dst.Addr().Unmap().As4()
		b = append(append(b, s[:]...), d[:]...)
	} else {
		s, d := src.Addr().As16(), dst.Addr().As16()
		b = append(append(b, s[:]...), d[:]...)
	}
	b = binary.BigEndian.AppendUint16(b, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	if !peer.IsZero() {
		id := peer.String()
		b = append(b, tlvPeer)
		b = binary.BigEndian.AppendUint16(b, uint16(len(id)))
		b = append(b, id...)
	}
	binary.BigEndian.PutUint16(b[start-2:], uint16(len(b)-start))
	return b
}
