package redirect

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"

	"github.com/cilium/ebpf/ringbuf"

	"github.com/ambit-mesh/ambit/ebpf/bpf"
)

// dropReasons are the drop counters' names and what an operator should know.
var dropReasons = map[bpf.CgroupReason]struct{ name, meaning string }{
	bpf.CgroupReasonREASON_HOLD:        {"hold", "the agent is rebuilding its state and does not know yet which pods are enrolled"},
	bpf.CgroupReasonREASON_BIND:        {"bind", "the socket could not be given the pod's own address"},
	bpf.CgroupReasonREASON_STORAGE:     {"memory", "no kernel memory to keep the connection's destination"},
	bpf.CgroupReasonREASON_ALIAS:       {"alias", "no loopback address left to stand for the destination"},
	bpf.CgroupReasonREASON_NO_LISTENER: {"no-listener", "ztunnel does not listen in the pod: it is down or has not acknowledged the pod"},
	bpf.CgroupReasonREASON_LEAK:        {"leak", "a SYN past all hooks: a raw or packet socket, a network stack of the app's own, or a process outside the pods' cgroup"},
	bpf.CgroupReasonREASON_MALFORMED:   {"malformed", "a packet whose headers hide what it is"},
	bpf.CgroupReasonREASON_FAMILY:      {"no-address", "the pod has no address of the destination's family"},
	bpf.CgroupReasonREASON_SQUAT:       {"proxy-port", "an app wanted a port that is the proxy's"},
}

// Drops counts what was refused, by reason, since the programs were installed.
func (h *Hooks) Drops() (map[string]uint64, error) {
	out := make(map[string]uint64, len(dropReasons))
	for _, r := range slices.Sorted(maps.Keys(dropReasons)) {
		var perCPU []uint64
		if err := h.maps[bpf.CgroupMapMeshDrops].Lookup(r, &perCPU); err != nil {
			return nil, fmt.Errorf("read drops: %w", err)
		}
		for _, n := range perCPU {
			out[dropReasons[r].name] += n
		}
	}
	return out, nil
}

// Drop is what the programs refused in one namespace for one reason: Count times
// since they told last, which they do at most once a second. Addresses are those of
// the last time; a hook that is too early to know one leaves it out.
type Drop struct {
	Cookie          uint64 // of the namespace
	Reason, Meaning string
	Local, Remote   netip.AddrPort // seen from the side that opened the connection
	Count           uint64
}

// WatchDrops tells of drops until ctx ends. One process may do so at a time: what
// one is told the other is not.
func (h *Hooks) WatchDrops(ctx context.Context, tell func(Drop)) error {
	r, err := ringbuf.NewReader(h.maps[bpf.CgroupMapMeshDropEvents])
	if err != nil {
		return fmt.Errorf("watch drops: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = r.Close() })() // wakes Read
	defer r.Close()
	for {
		rec, err := r.Read()
		if errors.Is(err, os.ErrClosed) {
			return nil
		} else if err != nil {
			return fmt.Errorf("watch drops: %w", err)
		}
		var e bpf.CgroupDropEvent
		if err := binary.Read(bytes.NewReader(rec.RawSample), binary.NativeEndian, &e); err != nil {
			return fmt.Errorf("watch drops: %w", err)
		}
		reason := dropReasons[e.Reason]
		tell(Drop{
			Cookie: e.Flow.Netns, Reason: reason.name, Meaning: reason.meaning, Count: e.Count,
			Local: endpoint(e.Flow.Local, e.Flow.LocalPort), Remote: endpoint(e.Flow.Remote, e.Flow.RemotePort),
		})
	}
}

// endpoint reads an address and a port as programs write them; the zero AddrPort if
// both are zero.
func endpoint(a bpf.CgroupAddress, port uint16) netip.AddrPort {
	var b [16]byte
	for i, w := range a.Word {
		binary.NativeEndian.PutUint32(b[i*4:], w)
	}
	var p [2]byte
	binary.NativeEndian.PutUint16(p[:], port)
	if b == [16]byte{} && port == 0 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(netip.AddrFrom16(b).Unmap(), binary.BigEndian.Uint16(p[:]))
}
