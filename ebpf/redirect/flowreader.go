package redirect

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/bpf"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/sockdiag"
)

// Decision is what redirection did with a connection.
type Decision string

const (
	Captured Decision = "captured" // passes the proxy of its own node
	Tunnel   Decision = "tunnel"   // of another proxy, with any number of connections inside
	Direct   Decision = "direct"   // under a lease, without proxy
	Excluded Decision = "excluded" // to a port that the pod leaves out
	Outside  Decision = "outside"  // passes no proxy: older than the enrolment, or a probe of the node
)

// Flow is a live connection of a pod with another address than its own, as the
// pod's kernel has it: no proxy is asked.
type Flow struct {
	Inbound             bool
	Source, Destination netip.AddrPort // as who opened it sees them
	Via                 netip.AddrPort // where it goes instead; zero: to its destination
	Decision            Decision
	State               sockdiag.State
	Since               time.Time // zero if nobody noted it
	Sent, Received      uint64    // bytes, of the end in the pod
	Cookie              uint64    // the kernel's number for that end

	// Who opened it: nothing is known of connections of others, or that rules
	// captured. The name is whatever the process calls its thread.
	Process string
	PID     uint32
	Cgroup  uint64
}

// FlowReader lists connections. It works beside the agent and without it, and
// changes nothing.
type FlowReader struct {
	maps    map[string]*ebpf.Map // none where no programs are pinned
	ids     map[string]uint32
	proxies map[uint64]bool
}

var flowMaps = []string{bpf.CgroupMapMeshWanted, bpf.CgroupMapMeshOwn, bpf.CgroupMapMeshDirect, bpf.CgroupMapMeshEnrolled}

// OpenFlows reads what is pinned below dir, if anything is.
func OpenFlows(dir string) (*FlowReader, error) {
	r := &FlowReader{maps: map[string]*ebpf.Map{}, ids: map[string]uint32{}}
	specs, err := bpf.LoadCgroup()
	if err != nil {
		return nil, err
	}
	for _, name := range flowMaps {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, mapsDir, name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			r.maps[name] = m
			err = specs.Maps[name].Compatible(m)
		}
		var info *ebpf.MapInfo
		if err == nil {
			info, err = m.Info()
		}
		if err != nil {
			r.Close()
			return nil, fmt.Errorf("open pinned map %s (of another version of this program?): %w", name, err)
		}
		id, _ := info.ID()
		r.ids[name] = uint32(id)
	}
	if len(r.maps) != 0 && len(r.maps) != len(flowMaps) {
		r.Close()
		return nil, fmt.Errorf("open pinned maps: some of them are missing in %s: the agent is starting, or was stopped while it did", dir)
	}
	if r.proxies, err = (&Hooks{cfg: HooksConfig{Dir: dir}}).proxies(); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// Close lets go of descriptors.
func (r *FlowReader) Close() { closeMaps(r.maps) }

// List returns ns's connections, in no order.
func (r *FlowReader) List(ns *netns.NS) ([]Flow, error) {
	var storages []int
	for _, name := range []string{bpf.CgroupMapMeshWanted, bpf.CgroupMapMeshOwn} {
		if m := r.maps[name]; m != nil {
			storages = append(storages, m.FD())
		}
	}
	all, err := sockdiag.ListDetail(ns, sockdiag.Connections|sockdiag.HalfOpen|sockdiag.Of(sockdiag.Listen), storages...)
	if err != nil {
		return nil, err
	}
	v := view{r: r, there: map[ends]bool{}, listens: map[uint16]bool{}, taken: map[netip.AddrPort]bool{}}
	if m := r.maps[bpf.CgroupMapMeshEnrolled]; m != nil {
		c, err := ns.Cookie()
		if err != nil {
			return nil, err
		}
		if err := m.Lookup(c, &v.enrolment); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, fmt.Errorf("read enrolment: %w", err)
		}
	}
	for _, s := range all {
		v.note(s.Socket)
	}
	var flows []Flow
	for _, s := range all {
		f, ok, err := v.flow(s)
		if err != nil {
			return nil, err
		}
		if ok {
			flows = append(flows, f)
		}
	}
	return flows, nil
}

// view is one namespace at one moment.
type view struct {
	r         *FlowReader
	enrolment bpf.CgroupEnrolment
	there     map[ends]bool
	listens   map[uint16]bool
	taken     map[netip.AddrPort]bool // apps' ends of what the proxy took by translation
}

func (v *view) note(s sockdiag.Socket) {
	if s.State == sockdiag.Listen {
		v.listens[s.Local.Port()] = true
		return
	}
	v.there[ends{s.Local, s.Remote}] = true
	if p := s.Local.Port(); (p == PortOutbound || p == PortDNS) && ofProxy(s, v.r.proxies) {
		v.taken[s.Remote] = true
	}
}

// flow says what a socket is to redirection; ok means that it is an end of a
// connection that leaves or enters the pod, and not one of the proxy's own.
func (v *view) flow(s sockdiag.Detail) (f Flow, ok bool, err error) {
	if s.State == sockdiag.Listen {
		return f, false, nil
	}
	f = Flow{Source: s.Local, Destination: s.Remote, State: s.State, Sent: s.Sent, Received: s.Received, Cookie: s.Cookie, Cgroup: s.Cgroup}
	wanted, captured := s.Storage[v.r.ids[bpf.CgroupMapMeshWanted]]
	_, own := s.Storage[v.r.ids[bpf.CgroupMapMeshOwn]]
	proxy := ofProxy(s.Socket, v.r.proxies)
	switch {
	case own:
		return f, false, nil
	case proxy:
		return v.ofProxy(f)
	case captured && isAlias(s.Remote.Addr()):
		return f, true, f.readCapture(wanted)
	}
	direct, err := v.r.direct(s.Cookie)
	if err != nil {
		return f, false, err
	}
	f.Inbound = s.State == sockdiag.SynRecv || v.listens[s.Local.Port()]
	switch {
	case direct != nil:
		f.Decision, f.Via, f.Inbound = Direct, s.Remote, false
		f.Destination = endpoint(direct.Key.Addr, direct.Key.Port)
		f.Since = atMonotonic(direct.Since)
		return f, true, nil
	case isOwn(s.Local.Addr()), isOwn(s.Remote.Addr()):
		return f, false, nil
	case v.taken[s.Local]:
		f.Decision, f.Inbound = Captured, false
		return f, true, nil
	case v.there[ends{s.Remote, s.Local}]:
		return f, false, nil // the app with itself, or with the proxy in a client's name
	}
	f.Decision = Outside
	port, ranges := s.Remote.Port(), v.enrolment.Outside[:]
	if f.Inbound {
		f.Source, f.Destination = s.Remote, s.Local
		port, ranges = s.Local.Port(), v.enrolment.Inside[:]
	}
	if slices.ContainsFunc(ranges, func(r bpf.CgroupPortRange) bool { return r.Last != 0 && r.First <= port && port <= r.Last }) {
		f.Decision = Excluded
	}
	return f, true, nil
}

// ofProxy is for sockets that the proxy accepted: what apps of the pod opened is
// told by their own ends.
func (v *view) ofProxy(f Flow) (Flow, bool, error) {
	local := f.Source.Port()
	if f.State == sockdiag.SynSent || local == PortOutbound || local == PortDNS || isOwn(f.Source.Addr()) || isOwn(f.Destination.Addr()) {
		return f, false, nil
	}
	if len(v.r.maps) == 0 && local != PortInbound && local != PortHBONE {
		return f, false, nil // a dial: the marks of rules tell no more
	}
	f.Inbound, f.Source, f.Destination, f.Cgroup = true, f.Destination, f.Source, 0
	f.Decision, f.Via = Captured, netip.AddrPortFrom(f.Destination.Addr(), PortInbound)
	if local == PortHBONE {
		f.Decision, f.Via = Tunnel, netip.AddrPort{}
	}
	return f, true, nil
}

func (f *Flow) readCapture(b []byte) error {
	var c bpf.CgroupCapture
	if len(b) < int(unsafe.Sizeof(c)) {
		return errors.New("read a socket's destination: too short")
	}
	// Laid out as the programs do, padding included.
	c = *(*bpf.CgroupCapture)(unsafe.Pointer(unsafe.SliceData(bytes.Clone(b))))
	o := c.Made.Origin
	name, _, _ := bytes.Cut(o.Comm[:], []byte{0})
	f.Decision, f.Via = Captured, f.Destination
	f.Destination = endpoint(c.Made.Wanted.Addr, c.Made.Wanted.Port)
	f.Since = atMonotonic(c.Since)
	f.Process, f.PID, f.Cgroup = string(name), o.Pid, o.Cgroup
	return nil
}

func (r *FlowReader) direct(socket uint64) (*bpf.CgroupDirect, error) {
	m := r.maps[bpf.CgroupMapMeshDirect]
	if m == nil {
		return nil, nil
	}
	d := &bpf.CgroupDirect{}
	if err := m.Lookup(socket, d); errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("read connections under leases: %w", err)
	}
	return d, nil
}

// isAlias reports an address that stands for a captured destination: ALIAS4 and
// ALIAS6 of maps.h.
func isAlias(a netip.Addr) bool { return aliases4.Contains(a) || aliases6.Contains(a) }

var aliases4 = netip.MustParsePrefix("127.64.0.0/10")

// atMonotonic is the time that the programs' clock tells.
func atMonotonic(ns uint64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // always there
	return time.Now().Add(time.Duration(int64(ns) - ts.Nano())).Truncate(time.Millisecond)
}
