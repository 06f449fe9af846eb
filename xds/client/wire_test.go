package client

import (
	"bytes"
	"slices"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
	"github.com/ambit-mesh/ambit/xds/turn"
)

// cutUp is a message in pieces of at most size bytes, 0: in one, with empty ones between them.
func cutUp(b []byte, size int) (out mem.BufferSlice) {
	if size == 0 {
		size = len(b) + 1
	}
	for c := range slices.Chunk(b, size) {
		out = append(out, mem.SliceBuffer(c), mem.SliceBuffer(nil))
	}
	return out
}

// read is a response as the client takes it.
func read(b []byte, size int) (*discovery.DeltaDiscoveryResponse, error) {
	r, out := &response{cutUp(b, size)}, &discovery.DeltaDiscoveryResponse{}
	var others turn.Taker
	h, err := r.head(&others)
	if err != nil {
		return nil, err
	}
	out.TypeUrl, out.Nonce, out.RemovedResources = h.typeURL, h.nonce, h.removed
	err = r.each(&others, func(raw *rawResource) {
		v := &discovery.Resource{Name: string(raw.name), Version: string(raw.version),
			Resource: &anypb.Any{TypeUrl: string(raw.typeURL), Value: raw.value}}
		for _, a := range raw.aliases {
			v.Aliases = append(v.Aliases, string(a))
		}
		out.Resources = append(out.Resources, v)
	})
	if len(out.Resources) != h.resources && err == nil {
		panic("BUG: resources were miscounted")
	}
	return out, err
}

func whole() *discovery.DeltaDiscoveryResponse {
	return &discovery.DeltaDiscoveryResponse{
		SystemVersionInfo: "v", TypeUrl: "t", Nonce: "n", RemovedResources: []string{"x", "", "y/z"},
		Resources: []*discovery.Resource{
			{Name: "a", Version: "1", Aliases: []string{"b", ""}, Resource: &anypb.Any{TypeUrl: "u", Value: bytes.Repeat([]byte{0, 0xff}, 300)}},
			{Ttl: durationpb.New(7)},
			{Name: "ü", Resource: &anypb.Any{}},
		},
	}
}

// FuzzResponse: what the client makes of bytes, in whatever pieces they come, is what proto.Unmarshal makes of them.
func FuzzResponse(f *testing.F) {
	b, err := proto.Marshal(whole())
	if err != nil {
		f.Fatal(err)
	}
	tagged := func(num protowire.Number, typ protowire.Type, v ...byte) []byte {
		return append(protowire.AppendTag(nil, num, typ), v...)
	}
	group := slices.Concat(tagged(9, protowire.StartGroupType), tagged(1, protowire.VarintType, 5), tagged(9, protowire.EndGroupType))
	for _, seed := range [][]byte{
		nil, b, b[:len(b)-1], b[:7], append(slices.Clone(b), b...), slices.Concat(group, b, group), slices.Concat(b, group[:2]),
		tagged(4, protowire.VarintType, 5), tagged(2, protowire.Fixed32Type, 1, 2, 3, 4), tagged(2, protowire.Fixed64Type, 1, 2, 3),
		tagged(4, protowire.BytesType, 2, 0xff, 0xfe), tagged(6, protowire.BytesType, 1, 0x80), tagged(1, protowire.BytesType, 1, 0x80), {0}, {0x80, 0x80}, {4},
		tagged(2, protowire.BytesType, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1), bytes.Repeat([]byte{0xff}, 11),
		tagged(2, protowire.BytesType, 4, 0x12, 2, 0x12, 0), tagged(2, protowire.BytesType, 3, 0x32, 1, 8), tagged(2, protowire.BytesType, 2, 0x0c, 0x0c),
		{0xfa, 0xff, 0xff, 0xff, 0x7f, 0}, {0x82, 0x80, 0x80, 0x80, 0x10, 0},
	} {
		for _, size := range []uint8{0, 1, 3, 64} {
			f.Add(seed, size)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, size uint8) {
		var want discovery.DeltaDiscoveryResponse
		wantErr := proto.Unmarshal(b, &want)
		got, err := read(b, int(size))
		if (err != nil) != (wantErr != nil) {
			t.Fatalf("%x in pieces of %d: %v, proto.Unmarshal says %v", b, size, err, wantErr)
		}
		if err != nil {
			return
		}
		want.SystemVersionInfo = ""
		for _, r := range want.Resources { // what nobody reads
			r.Ttl = nil
			if r.Resource == nil {
				r.Resource = &anypb.Any{}
			}
			r.Resource.ProtoReflect().SetUnknown(nil)
			r.ProtoReflect().SetUnknown(nil)
		}
		want.ProtoReflect().SetUnknown(nil)
		if !proto.Equal(got, &want) {
			t.Errorf("%x in pieces of %d: %v, want %v", b, size, got, &want)
		}
	})
}

// What lies in one piece is handed on as it lies there.
func TestValuesAreNotCopied(t *testing.T) {
	b, err := proto.Marshal(whole())
	if err != nil {
		t.Fatal(err)
	}
	r := &response{cutUp(b, 0)}
	n := 0
	if err := r.each(new(turn.Taker), func(raw *rawResource) {
		if n++; n > 1 {
			return
		}
		i := bytes.Index(b, raw.value)
		if b[i]++; raw.value[0] != b[i] {
			t.Error("a value was copied")
		}
	}); err != nil || n != 3 {
		t.Error(n, err)
	}
}
