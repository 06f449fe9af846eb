package redirect_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/bpf"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// The packet programs do not read the packets of which they can tell at a look that
// they begin no connection (packet_goes_on of packet.h). What they decide has to be
// what they decide after reading.

const (
	verdictNetns = 7
	verdictPass  = ^uint32(0) // TC_PASS
	verdictDrop  = 2          // TC_DROP
	frameMin     = 15         // less the kernel does not run programs on
)

// packetPrograms are a pod's, with maps of their own.
type packetPrograms struct {
	gate, probe *ebpf.Program
	drops       *ebpf.Map // by the gate
	dials       *ebpf.Map // of the probe
}

// loadPacketPrograms loads them for an enrolled pod, that of syn's connections.
func loadPacketPrograms(t testing.TB, unhurried bool) *packetPrograms {
	t.Helper()
	pod, err := bpf.LoadPod()
	check(t, err)
	node, err := bpf.LoadCgroup()
	check(t, err)
	node.Programs = map[string]*ebpf.ProgramSpec{bpf.CgroupProgNodeProbe: node.Programs[bpf.CgroupProgNodeProbe]}
	pod.Programs = map[string]*ebpf.ProgramSpec{bpf.PodProgPodGate: pod.Programs[bpf.PodProgPodGate]}
	check(t, pod.Variables["pod_netns"].Set(uint64(verdictNetns)), pod.Variables["packet_unhurried"].Set(unhurried), node.Variables["packet_unhurried"].Set(unhurried))
	load := func(spec *ebpf.CollectionSpec) *ebpf.Collection {
		coll, err := ebpf.NewCollection(spec)
		check(t, err)
		t.Cleanup(coll.Close)
		return coll
	}
	p, n := load(pod), load(node)
	check(t, p.Maps[bpf.PodMapMeshEnrolled].Put(uint64(verdictNetns), bpf.CgroupEnrolment{Flags: bpf.CgroupEnrolmentFlagENROL_OUTBOUND}))
	for _, a := range []netip.Addr{clientV4, clientV6} {
		check(t, n.Maps[bpf.CgroupMapMeshPods].Put(words(a), uint64(verdictNetns)))
	}
	return &packetPrograms{
		gate: p.Programs[bpf.PodProgPodGate], probe: n.Programs[bpf.CgroupProgNodeProbe],
		drops: p.Maps[bpf.PodMapMeshDrops], dials: n.Maps[bpf.CgroupMapMeshDials],
	}
}

func words(a netip.Addr) (out bpf.CgroupAddress) {
	b := a.As16()
	for i := range out.Word {
		out.Word[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return out
}

// verdict is all that the programs did with a frame.
type verdict struct {
	gate, probe uint32
	forgot      [2]bool // that a flow of each family is a probe
	err         error   // the kernel refuses to make some packets
}

func (p *packetPrograms) run(t testing.TB, frame []byte, gso bool) (v verdict) {
	t.Helper()
	flows := [2]bpf.CgroupFlow{}
	for i, a := range [2][2]netip.Addr{{podV4, clientV4}, {podV6, clientV6}} {
		flows[i] = bpf.CgroupFlow{Netns: verdictNetns, Local: words(a[0]), Remote: words(a[1])}
		ports := syn(nil)
		flows[i].LocalPort, flows[i].RemotePort = binary.NativeEndian.Uint16(ports), binary.NativeEndian.Uint16(ports[2:])
		check(t, p.dials.Put(flows[i], uint64(1)))
	}
	var gateErr, probeErr error
	v.gate, gateErr = testRun(p.gate, frame, gso)
	v.probe, probeErr = testRun(p.probe, frame, gso)
	v.err = errors.Join(gateErr, probeErr)
	for i, f := range flows {
		var until uint64
		err := p.dials.Lookup(f, &until)
		if v.forgot[i] = errors.Is(err, ebpf.ErrKeyNotExist); !v.forgot[i] {
			check(t, err)
		}
	}
	return v
}

func testRun(p *ebpf.Program, frame []byte, gso bool) (uint32, error) {
	opts := &ebpf.RunOptions{Data: frame}
	if gso {
		// struct __sk_buff of linux/bpf.h up to gso_size, with gso_segs at 164.
		ctx := make([]byte, 180)
		binary.NativeEndian.PutUint32(ctx[164:], 2)
		binary.NativeEndian.PutUint32(ctx[176:], 1000)
		opts.Context = ctx
	}
	return p.Run(opts)
}

// dropped is how often the gate dropped, by reason.
func (p *packetPrograms) dropped(t testing.TB) (out []uint64) {
	t.Helper()
	for reason := range p.drops.MaxEntries() {
		var perCPU []uint64
		check(t, p.drops.Lookup(reason, &perCPU))
		sum := uint64(0)
		for _, n := range perCPU {
			sum += n
		}
		out = append(out, sum)
	}
	return out
}

// bothPrograms are the same programs with and without a hurry.
type bothPrograms struct{ hurried, full *packetPrograms }

func loadBoth(t testing.TB) bothPrograms {
	t.Helper()
	netlab.Require(t)
	netlab.RequireEBPF(t)
	return bothPrograms{loadPacketPrograms(t, false), loadPacketPrograms(t, true)}
}

// compare runs both on a frame and returns what they agree on.
func (b bothPrograms) compare(t testing.TB, name string, frame []byte, gso bool) verdict {
	t.Helper()
	have, want := b.hurried.run(t, frame, gso), b.full.run(t, frame, gso)
	for _, v := range []verdict{have, want} {
		if v.err != nil && !errors.Is(v.err, unix.EINVAL) {
			t.Fatalf("%s: %v", name, v.err)
		}
	}
	if (have.err == nil) != (want.err == nil) || have.gate != want.gate || have.probe != want.probe || have.forgot != want.forgot {
		t.Fatalf("%s: %+v, and %+v for who reads in full: frame %x", name, have, want, frame)
	}
	return have
}

func TestVerdicts(t *testing.T) {
	b := loadBoth(t)
	count := map[string]int{}
	each := func(name string, frame []byte, gso ...bool) {
		for _, gso := range append(gso, false) {
			v := b.compare(t, name, frame, gso)
			switch {
			case v.err != nil:
				count["refused by the kernel"]++
			case v.gate == verdictPass:
				count["passed"]++
			case v.gate == verdictDrop:
				count["dropped"]++
			default:
				t.Fatalf("%s: verdict %d", name, v.gate)
			}
			if v.forgot[0] || v.forgot[1] {
				count["no probe any more"]++
			}
		}
	}
	corpus := slices.Collect(frames)
	for _, f := range corpus {
		each(f.name, f.bytes, true)
		for n := frameMin; n < min(len(f.bytes), 100); n++ {
			if f.everyLength {
				each(fmt.Sprintf("%s cut to %d", f.name, n), f.bytes[:n])
			}
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 5000 {
		f := slices.Clone(corpus[random.IntN(len(corpus))].bytes)
		for range 1 + random.IntN(3) {
			// Mostly where programs look: types, lengths, protocols, fragments, flags.
			at := []int{12, 13, 14, 20, 21, 23, 47, 67, random.IntN(len(f)), random.IntN(len(f))}[random.IntN(10)]
			if at < len(f) {
				f[at] = byte(random.Uint32())
			}
		}
		each("mutated", f[:max(frameMin, len(f)-random.IntN(2)*random.IntN(len(f)))])
	}
	if have, want := b.hurried.dropped(t), b.full.dropped(t); !slices.Equal(have, want) {
		t.Errorf("drops by reason are %v, and %v for who reads in full", have, want)
	}
	t.Logf("%v", count)
	for _, what := range []string{"passed", "dropped", "no probe any more"} {
		if count[what] < 500 {
			t.Errorf("only %d frames were %s: the corpus proves little", count[what], what)
		}
	}
}

// FuzzVerdict has frames that nobody thought of.
func FuzzVerdict(f *testing.F) {
	b := loadBoth(f)
	for x := range frames {
		if x.everyLength {
			f.Add(x.bytes, false)
		}
	}
	f.Fuzz(func(t *testing.T, frame []byte, gso bool) {
		if len(frame) < frameMin || len(frame) > 2000 {
			t.Skip()
		}
		b.compare(t, "frame", frame, gso)
	})
}

type testFrame struct {
	name        string
	bytes       []byte
	everyLength bool // worth cutting everywhere
}

// frames are all variants of headers that the programs tell apart, and some more.
func frames(yield func(testFrame) bool) {
	ok := true
	add := func(every bool, frame []byte, format string, args ...any) {
		ok = ok && yield(testFrame{fmt.Sprintf(format, args...), slices.Concat(make([]byte, 12), frame), every})
	}
	tcp := func(flags byte) []byte {
		b := append(syn(nil), make([]byte, 24)...)
		b[13] = flags
		return b
	}
	v4 := func(version byte, fragment uint16, proto byte, payload []byte) []byte {
		h := ip4(podV4, clientV4, proto, fragment, nil)
		h[0] = version
		options := []byte{}
		if n := int(version&0xf) - 5; n > 0 {
			options = slices.Repeat([]byte{1}, 4*n)
		}
		binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(options)+len(payload)))
		return ether(unix.ETH_P_IP, slices.Concat(h, options, payload))
	}
	v6 := func(next byte, payload []byte) []byte {
		return ether(unix.ETH_P_IPV6, ip6(podV6, clientV6, next, payload))
	}
	ext := func(next, words byte, offset uint16) []byte {
		return append([]byte{next, words, byte(offset >> 8), byte(offset)}, make([]byte, 4+8*int(words))...)
	}
	some := []byte{0x00, 0x02, 0x10, 0x12, 0x04, 0x14, 0x06, 0x03, 0x42, 0xc2, 0xd2, 0x2a, 0xff, 0x01, 0x11, 0x18}
	// Flags, all of them.
	for flags := range 256 {
		add(false, v4(0x45, 0, unix.IPPROTO_TCP, tcp(byte(flags))), "IPv4, flags %#x", flags)
		add(false, v4(0x45, 0x4000, unix.IPPROTO_TCP, tcp(byte(flags))), "IPv4, not to be fragmented, flags %#x", flags)
		add(false, v6(unix.IPPROTO_TCP, tcp(byte(flags))), "IPv6, flags %#x", flags)
	}
	for _, flags := range some {
		every := flags == 0x02 || flags == 0x10
		for version := range 256 {
			if v := byte(version); v>>4 == 4 || v&0xf == 5 || v&0xf == 6 {
				add(every && v>>4 == 4, v4(v, 0, unix.IPPROTO_TCP, tcp(flags)), "IPv4, version and length %#x, flags %#x", version, flags)
			}
		}
		for _, fragment := range []uint16{0x8000, 0x2000, 0x6000, 0xe000, 1, 2, 3, 4, 5, 8, 0x2001, 0x2002, 0x4001, 0x1fff, 0x3fff, 0x100, 0xff} {
			add(every, v4(0x45, fragment, unix.IPPROTO_TCP, tcp(flags)), "IPv4, fragment %#x, flags %#x", fragment, flags)
			add(false, v4(0x46, fragment, unix.IPPROTO_TCP, tcp(flags)), "IPv4 with options, fragment %#x, flags %#x", fragment, flags)
		}
		for proto := range 256 {
			add(false, v4(0x45, 0, byte(proto), tcp(flags)), "IPv4, protocol %d, flags %#x", proto, flags)
			add(false, v6(byte(proto), tcp(flags)), "IPv6, next header %d, flags %#x", proto, flags)
		}
		inner4, inner6 := v4(0x45, 0, unix.IPPROTO_TCP, tcp(flags))[2:], v6(unix.IPPROTO_TCP, tcp(flags))[2:]
		for _, in := range []struct {
			name  string
			proto byte
			bytes []byte
		}{{"IPv4", unix.IPPROTO_IPIP, inner4}, {"IPv6", unix.IPPROTO_IPV6, inner6}} {
			add(every, v4(0x45, 0, in.proto, in.bytes), "%s in IPv4, flags %#x", in.name, flags)
			add(every, v6(in.proto, in.bytes), "%s in IPv6, flags %#x", in.name, flags)
			add(false, v4(0x45, 0, unix.IPPROTO_TCP, in.bytes), "%s told as TCP in IPv4, flags %#x", in.name, flags)
			add(false, v6(unix.IPPROTO_TCP, in.bytes), "%s told as TCP in IPv6, flags %#x", in.name, flags)
			for _, e := range []byte{0, 43, 44, 60} {
				add(every, v6(e, slices.Concat(ext(in.proto, 0, 0), in.bytes)), "%s in IPv6 with %d, flags %#x", in.name, e, flags)
			}
		}
		for _, e := range []byte{0, 43, 44, 51, 60, 135} {
			for _, words := range []byte{0, 1, 3} {
				for _, offset := range []uint16{0, 1, 2, 6, 8, 9, 16, 0xfff8} {
					add(every && words == 0 && offset <= 8, v6(e, slices.Concat(ext(unix.IPPROTO_TCP, words, offset), tcp(flags))),
						"IPv6 with %d of %d words, offset %#x, flags %#x", e, words, offset, flags)
				}
			}
		}
		for n := 1; n <= 9; n++ {
			add(false, v6(60, slices.Concat(slices.Repeat(ext(60, 0, 0), n-1), ext(unix.IPPROTO_TCP, 0, 0), tcp(flags))), "IPv6 with %d extensions, flags %#x", n, flags)
		}
		for name, f := range map[string][]byte{"IPv4": v4(0x45, 0, unix.IPPROTO_TCP, tcp(flags)), "IPv6": v6(unix.IPPROTO_TCP, tcp(flags))} {
			tagged := f
			for tags := 1; tags <= 4; tags++ {
				tagged = vlan(tagged)
				add(every, tagged, "%s with %d tags, flags %#x", name, tags, flags)
				add(false, append([]byte{0x88, 0xa8}, tagged[2:]...), "%s with %d tags, the first of 802.1ad, flags %#x", name, tags, flags)
			}
			for _, kind := range []uint16{0, 0x05dc, unix.ETH_P_ARP, unix.ETH_P_IP + 1, 0x0008, 0xdd86, unix.ETH_P_IPV6 - 1, 0x8847, 0x8863, 0x9100, 0xffff} {
				add(false, ether(kind, f[2:]), "%s told as %#x, flags %#x", name, kind, flags)
			}
		}
		add(false, ether(unix.ETH_P_IPV6, inner4), "IPv4 told as IPv6, flags %#x", flags)
		add(false, ether(unix.ETH_P_IP, inner6), "IPv6 told as IPv4, flags %#x", flags)
	}
}
