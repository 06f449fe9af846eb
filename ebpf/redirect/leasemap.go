package redirect

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"

	"github.com/ambit-mesh/ambit/ebpf/bpf"
	"github.com/ambit-mesh/ambit/ebpf/lease"
)

// rawKey is a key as programs write it.
func rawKey(k lease.Key) bpf.CgroupLeaseKey {
	return bpf.CgroupLeaseKey{Netns: k.NetNS, Addr: address16(k.Addr.Addr()), Port: port16(k.Addr)}
}

func keyOf(k bpf.CgroupLeaseKey) lease.Key {
	return lease.Key{NetNS: k.Netns, Addr: endpoint(k.Addr, k.Port)}
}

// port16 is a port in network order, in a number of the machine's order.
func port16(a netip.AddrPort) uint16 { return bits.ReverseBytes16(a.Port()) }

func decodeEvent(raw []byte, e *bpf.CgroupDirectEvent) error {
	if err := binary.Read(bytes.NewReader(raw), binary.NativeEndian, e); err != nil {
		return fmt.Errorf("decode event of %d bytes: %w", len(raw), err)
	}
	return nil
}
