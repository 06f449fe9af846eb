package dir

import (
	"encoding"
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"

	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/ambit-mesh/ambit/xds/crd"
)

const (
	// No Kubernetes object nests deeper; a self-referring YAML alias does.
	maxDepth = 100
	// Nodes that one document may reach through aliases. Enough for anchors
	// that people write, too few for a "billion laughs" document.
	maxAliased = 10_000
	// Faults listed per object: the rest is usually the same mistake.
	maxFaults = 20
)

// fault is one mistake at one node.
type fault struct {
	line int
	crd.Fault
}

// strict decodes a YAML node tree into Go values as the API server decodes JSON
// with strict field validation: names are case-sensitive, and an unknown field, a
// duplicate key or a value of another type is a fault. It goes on after a fault,
// so that a user sees all of them at once.
type strict struct {
	faults  []fault
	path    []string
	depth   int
	alias   int // depth of alias expansion
	aliased int // nodes visited inside aliases
	spent   bool
}

// decode fills v, which must be a pointer, from n.
func (s *strict) decode(n *yaml.Node, v any) { s.value(n, reflect.ValueOf(v).Elem()) }

func (s *strict) fault(n *yaml.Node, hint, format string, args ...any) {
	if len(s.faults) >= maxFaults {
		return
	}
	s.faults = append(s.faults, fault{n.Line, crd.Fault{
		Path:    strings.TrimPrefix(strings.Join(s.path, ""), "."),
		Message: fmt.Sprintf(format, args...),
		Hint:    hint,
	}})
}

func (s *strict) push(segment string) { s.path = append(s.path, segment) }
func (s *strict) pop()                { s.path = s.path[:len(s.path)-1] }

// enter follows aliases and applies the bounds; leave undoes it.
func (s *strict) enter(n *yaml.Node) (*yaml.Node, bool) {
	s.depth++
	if n.Kind == yaml.AliasNode {
		s.alias++
	}
	if s.alias > 0 {
		s.aliased++
	}
	switch {
	case s.spent:
		return nil, false
	case s.depth > maxDepth:
		s.fault(n, "", "is nested more than %d levels deep", maxDepth)
		s.spent = true
		return nil, false
	case s.aliased > maxAliased:
		s.fault(n, "write the values out", "aliases expand to more than %d values", maxAliased)
		s.spent = true
		return nil, false
	}
	if n.Kind == yaml.AliasNode {
		return n.Alias, n.Alias != nil
	}
	return n, true
}

func (s *strict) leave(n *yaml.Node) {
	s.depth--
	if n.Kind == yaml.AliasNode {
		s.alias--
	}
}

var (
	quantityType = reflect.TypeFor[resource.Quantity]()
	intstrType   = reflect.TypeFor[intstr.IntOrString]()
	timeType     = reflect.TypeFor[metav1.Time]()
	microType    = reflect.TypeFor[metav1.MicroTime]()
	durationType = reflect.TypeFor[metav1.Duration]()
	jsonIface    = reflect.TypeFor[json.Unmarshaler]()
	textIface    = reflect.TypeFor[encoding.TextUnmarshaler]()
	enumIface    = reflect.TypeFor[crd.Enum]()
)

func (s *strict) value(at *yaml.Node, v reflect.Value) {
	n, ok := s.enter(at)
	defer s.leave(at)
	if !ok || isNull(n) {
		return // null is absent, as in the API
	}
	t := v.Type()
	if t.Kind() == reflect.Pointer {
		p := reflect.New(t.Elem())
		s.value(n, p.Elem())
		v.Set(p)
		return
	}
	switch t {
	case quantityType, intstrType, timeType, microType, durationType:
		s.wellKnown(n, v)
		return
	}
	if p := reflect.PointerTo(t); p.Implements(jsonIface) || p.Implements(textIface) {
		s.viaJSON(n, v)
		return
	}
	switch t.Kind() {
	case reflect.Struct:
		s.structure(n, v)
	case reflect.Map:
		s.mapping(n, v)
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			s.bytes(n, v)
			return
		}
		s.list(n, v)
	case reflect.Interface:
		if x := s.any(n); x != nil {
			v.Set(reflect.ValueOf(x))
		}
	default:
		s.scalar(n, v)
	}
}

// entry is a key and its value, with merge keys resolved.
type entry struct {
	name     string
	key, val *yaml.Node
}

// entries lists the pairs of a mapping, reporting duplicate keys. Keys merged
// with "<<" yield to keys written out.
func (s *strict) entries(n *yaml.Node) []entry {
	if n.Kind != yaml.MappingNode {
		s.fault(n, "", "expected an object, found %s", describe(n))
		return nil
	}
	out := make([]entry, 0, len(n.Content)/2)
	seen := make(map[string]int, len(n.Content)/2)
	var merged []*yaml.Node
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, val := n.Content[i], n.Content[i+1]
		if k.Kind == yaml.AliasNode && k.Alias != nil {
			k = k.Alias
		}
		if k.Kind != yaml.ScalarNode {
			s.fault(k, "", "key is %s, expected a string", describe(k))
			continue
		}
		if k.Tag == "!!merge" {
			merged = append(merged, val)
			continue
		}
		if first, dup := seen[k.Value]; dup {
			s.push("." + k.Value)
			s.fault(k, fmt.Sprintf("the first is on line %d of the document", first), "duplicate field %q", k.Value)
			s.pop()
			continue
		}
		seen[k.Value] = k.Line
		out = append(out, entry{k.Value, k, val})
	}
	for _, m := range merged {
		out = s.merge(m, out, seen)
	}
	return out
}

func (s *strict) merge(at *yaml.Node, out []entry, seen map[string]int) []entry {
	n, ok := s.enter(at)
	defer s.leave(at)
	if !ok {
		return out
	}
	if n.Kind == yaml.SequenceNode {
		for _, item := range n.Content {
			out = s.merge(item, out, seen)
		}
		return out
	}
	for _, e := range s.entries(n) {
		s.aliased++
		if _, have := seen[e.name]; !have {
			seen[e.name] = e.key.Line
			out = append(out, e)
		}
	}
	return out
}

// structInfo maps JSON names to field indexes, embedded structs flattened.
type structInfo struct {
	index map[string][]int
	names []string
}

var structs sync.Map // reflect.Type → *structInfo, a cache of what reflection says

func infoOf(t reflect.Type) *structInfo {
	if si, ok := structs.Load(t); ok {
		return si.(*structInfo)
	}
	si := &structInfo{index: map[string][]int{}}
	si.add(t, nil)
	slices.Sort(si.names)
	got, _ := structs.LoadOrStore(t, si)
	return got.(*structInfo)
}

func (si *structInfo) add(t reflect.Type, prefix []int) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		index := append(slices.Clone(prefix), i)
		switch {
		case name == "-" || !f.IsExported():
		case f.Anonymous && name == "" && f.Type.Kind() == reflect.Struct:
			si.add(f.Type, index)
		case name != "":
			si.index[name] = index
			si.names = append(si.names, name)
		}
	}
}

func (s *strict) structure(n *yaml.Node, v reflect.Value) {
	si := infoOf(v.Type())
	for _, e := range s.entries(n) {
		s.push("." + e.name)
		if index, ok := si.index[e.name]; ok {
			s.value(e.val, v.FieldByIndex(index))
		} else {
			s.fault(e.key, si.suggest(v.Type(), e.name), "unknown field %q", e.name)
		}
		s.pop()
	}
}

// suggest finds what an unknown field was meant to be: a near name, or the same
// name one level further in.
func (si *structInfo) suggest(t reflect.Type, name string) string {
	for _, outer := range si.names {
		ft := t.FieldByIndex(si.index[outer]).Type
		for ft.Kind() == reflect.Pointer || ft.Kind() == reflect.Slice {
			ft = ft.Elem()
		}
		if ft.Kind() != reflect.Struct || nearest(name, si.names) != "" {
			continue
		}
		if _, ok := infoOf(ft).index[name]; ok {
			return fmt.Sprintf("it belongs under %q", outer)
		}
	}
	if hint := didYouMean(name, si.names); hint != "" || len(si.names) > 8 {
		return hint
	}
	return "valid are " + strings.Join(si.names, ", ")
}

func (s *strict) mapping(n *yaml.Node, v reflect.Value) {
	t := v.Type()
	entries := s.entries(n)
	m := reflect.MakeMapWithSize(t, len(entries))
	for _, e := range entries {
		s.push("[" + e.name + "]")
		k := reflect.New(t.Key()).Elem()
		if s.mapKey(e, k) {
			if isNull(e.val) && t.Elem().Kind() == reflect.Pointer {
				s.fault(e.val, "", "is empty")
			}
			val := reflect.New(t.Elem()).Elem()
			s.value(e.val, val)
			m.SetMapIndex(k, val)
		}
		s.pop()
	}
	v.Set(m)
}

// mapKey sets k from a key; numbers may be written with or without quotes.
func (s *strict) mapKey(e entry, k reflect.Value) bool {
	switch k.Kind() {
	case reflect.String:
		k.SetString(e.name)
		return true
	case reflect.Uint32, reflect.Uint64, reflect.Uint16:
		u, err := strconv.ParseUint(e.name, 10, k.Type().Bits())
		if err != nil {
			s.fault(e.key, "", "key %q is not a number from 0 to %d", e.name, uint64(math.MaxUint64)>>(64-k.Type().Bits()))
			return false
		}
		k.SetUint(u)
		return true
	}
	s.fault(e.key, "", "key %q cannot be read", e.name)
	return false
}

func (s *strict) list(n *yaml.Node, v reflect.Value) {
	if n.Kind != yaml.SequenceNode {
		s.fault(n, "start each item with \"- \"", "expected a list, found %s", describe(n))
		return
	}
	out := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, item := range n.Content {
		s.push("[" + strconv.Itoa(i) + "]")
		if isNull(item) {
			s.fault(item, "remove the item or fill it in; {} is an item without fields", "item is empty")
		} else {
			s.value(item, out.Index(i))
		}
		s.pop()
	}
	v.Set(out)
}
