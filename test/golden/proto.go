package golden

import (
	"fmt"
	"net/netip"
	"sort"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// Proto renders a message for people: one field a line in the order of the field
// numbers, addresses as addresses, nothing random. Not meant to be parsed.
func Proto(m proto.Message) string {
	var b strings.Builder
	writeMessage(&b, m.ProtoReflect(), "")
	return b.String()
}

func writeMessage(b *strings.Builder, m protoreflect.Message, indent string) {
	m = unpacked(m)
	fields := m.Descriptor().Fields()
	order := make([]protoreflect.FieldDescriptor, fields.Len())
	for i := range order {
		order[i] = fields.Get(i)
	}
	sort.Slice(order, func(i, j int) bool { return order[i].Number() < order[j].Number() })
	for _, f := range order {
		if !m.Has(f) {
			continue
		}
		v := m.Get(f)
		switch {
		case f.IsMap():
			var keys []string
			entries := map[string]protoreflect.Value{}
			v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
				keys = append(keys, k.String())
				entries[k.String()] = v
				return true
			})
			sort.Strings(keys)
			for _, k := range keys {
				writeValue(b, fmt.Sprintf("%s[%s]", f.Name(), k), f.MapValue(), entries[k], indent)
			}
		case f.IsList():
			for i := range v.List().Len() {
				writeValue(b, string(f.Name()), f, v.List().Get(i), indent)
			}
		default:
			writeValue(b, string(f.Name()), f, v, indent)
		}
	}
}

func writeValue(b *strings.Builder, name string, f protoreflect.FieldDescriptor, v protoreflect.Value, indent string) {
	switch f.Kind() {
	case protoreflect.MessageKind:
		if line, ok := oneLine(v.Message()); ok {
			fmt.Fprintf(b, "%s%s {%s}\n", indent, name, line)
			return
		}
		fmt.Fprintf(b, "%s%s\n", indent, name)
		writeMessage(b, v.Message(), indent+"  ")
	default:
		fmt.Fprintf(b, "%s%s: %s\n", indent, name, scalar(f, v))
	}
}

// unpacked is what a google.protobuf.Any holds, when its type is linked in.
func unpacked(m protoreflect.Message) protoreflect.Message {
	if a, ok := m.Interface().(*anypb.Any); ok {
		if inner, err := a.UnmarshalNew(); err == nil {
			return inner.ProtoReflect()
		}
	}
	return m
}

// oneLine renders a message that has nothing but a few scalars.
func oneLine(m protoreflect.Message) (string, bool) {
	var parts []string
	ok := true
	m = unpacked(m)
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if !m.Has(f) {
			continue
		}
		switch {
		case f.IsList() || f.IsMap():
			ok = false
		case f.Kind() == protoreflect.MessageKind:
			line, simple := oneLine(m.Get(f).Message())
			ok = ok && simple && line == ""
			parts = append(parts, string(f.Name()))
		default:
			parts = append(parts, fmt.Sprintf("%s: %s", f.Name(), scalar(f, m.Get(f))))
		}
	}
	return strings.Join(parts, ", "), ok && len(parts) <= 4
}

func scalar(f protoreflect.FieldDescriptor, v protoreflect.Value) string {
	switch f.Kind() {
	case protoreflect.BytesKind:
		if a, ok := netip.AddrFromSlice(v.Bytes()); ok {
			return a.String()
		}
		return fmt.Sprintf("%x", v.Bytes())
	case protoreflect.EnumKind:
		if d := f.Enum().Values().ByNumber(v.Enum()); d != nil {
			return string(d.Name())
		}
	case protoreflect.StringKind:
		return fmt.Sprintf("%q", v.String())
	}
	return v.String()
}
