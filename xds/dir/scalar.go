package dir

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/ambit-mesh/ambit/xds/crd"
)

func (s *strict) bytes(n *yaml.Node, v reflect.Value) {
	if !isString(n) {
		s.fault(n, "", "expected a base64 string, found %s", describe(n))
		return
	}
	b, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(n.Value), ""))
	if err != nil {
		s.fault(n, "", "is not base64")
		return
	}
	v.SetBytes(b)
}

func (s *strict) scalar(n *yaml.Node, v reflect.Value) {
	if n.Kind != yaml.ScalarNode {
		s.fault(n, "", "expected %s, found %s", typeName(v.Type()), describe(n))
		return
	}
	switch v.Kind() {
	case reflect.String:
		s.str(n, v)
	case reflect.Bool:
		b, ok := boolOf(n)
		if !ok {
			s.fault(n, "write true or false without quotes", "expected a boolean, found %s", describe(n))
			return
		}
		v.SetBool(b)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		i, err := intOf(n)
		if err == nil && v.OverflowInt(i) {
			err = strconv.ErrRange
		}
		if err != nil {
			s.badInt(n, v, err)
			return
		}
		v.SetInt(i)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		i, err := intOf(n)
		if err == nil && (i < 0 || v.OverflowUint(uint64(i))) {
			err = strconv.ErrRange
		}
		if err != nil {
			s.badInt(n, v, err)
			return
		}
		v.SetUint(uint64(i))
	case reflect.Float32, reflect.Float64:
		var f float64
		if t := n.ShortTag(); (t != "!!int" && t != "!!float") || n.Decode(&f) != nil {
			s.fault(n, "", "expected a number, found %s", describe(n))
			return
		}
		v.SetFloat(f)
	default:
		s.fault(n, "", "cannot be set here")
	}
}

func (s *strict) badInt(n *yaml.Node, v reflect.Value, err error) {
	hint := ""
	if _, numeric := strconv.ParseInt(n.Value, 10, 64); numeric == nil && isString(n) {
		hint = "remove the quotes"
	}
	if errors.Is(err, strconv.ErrRange) {
		s.fault(n, "", "%s is out of range for %s", n.Value, v.Type().Kind())
		return
	}
	s.fault(n, hint, "expected an integer, found %s", describe(n))
}

func (s *strict) str(n *yaml.Node, v reflect.Value) {
	if !isString(n) {
		s.fault(n, fmt.Sprintf("write %q in quotes", n.Value), "expected a string, found %s", describe(n))
		return
	}
	v.SetString(n.Value)
	if values := enumValues(v); values != nil && n.Value != "" && !slices.Contains(values, n.Value) {
		hint := didYouMean(n.Value, values)
		if hint == "" {
			hint = "valid are " + strings.Join(values, ", ")
		}
		s.fault(n, hint, "unsupported value %q", n.Value)
	}
}

func enumValues(v reflect.Value) []string {
	if v.Type().Implements(enumIface) {
		return v.Interface().(crd.Enum).Values()
	}
	return kubeEnums[v.Type()]
}

// wellKnown decodes the API's types that have a textual form of their own.
func (s *strict) wellKnown(n *yaml.Node, v reflect.Value) {
	if n.Kind != yaml.ScalarNode {
		s.fault(n, "", "expected %s, found %s", typeName(v.Type()), describe(n))
		return
	}
	tag := n.ShortTag()
	switch v.Type() {
	case quantityType:
		q, err := resource.ParseQuantity(n.Value)
		if err != nil || tag == "!!bool" {
			s.fault(n, `examples are 500m, 2, 64Mi`, "%q is not a quantity", n.Value)
			return
		}
		v.Set(reflect.ValueOf(q))
	case intstrType:
		if tag == "!!int" {
			i, err := intOf(n)
			if err != nil || i < math.MinInt32 || i > math.MaxInt32 {
				s.fault(n, "", "%s is out of range", n.Value)
				return
			}
			v.Set(reflect.ValueOf(intstr.FromInt32(int32(i))))
			return
		}
		if !isString(n) {
			s.fault(n, "", "expected an integer or a string, found %s", describe(n))
			return
		}
		v.Set(reflect.ValueOf(intstr.FromString(n.Value)))
	case durationType:
		d, err := time.ParseDuration(n.Value)
		if err != nil {
			s.fault(n, "examples are 10s, 1h30m", "%q is not a duration", n.Value)
			return
		}
		v.Set(reflect.ValueOf(metav1.Duration{Duration: d}))
	default:
		t, err := time.Parse(time.RFC3339Nano, n.Value)
		if err != nil {
			s.fault(n, "an example is 2026-01-31T12:00:00Z", "%q is not a time", n.Value)
			return
		}
		if v.Type() == microType {
			v.Set(reflect.ValueOf(metav1.NewMicroTime(t)))
			return
		}
		v.Set(reflect.ValueOf(metav1.NewTime(t)))
	}
}

// viaJSON leaves a type with its own JSON form to that form.
func (s *strict) viaJSON(n *yaml.Node, v reflect.Value) {
	before := len(s.faults)
	x := s.any(n)
	if len(s.faults) > before {
		return
	}
	b, err := json.Marshal(x)
	if err == nil {
		err = json.Unmarshal(b, v.Addr().Interface())
	}
	if err != nil {
		s.fault(n, "", "cannot be read as %s: %v", v.Type().Name(), err)
	}
}

// any decodes without a schema, into what encoding/json would give.
func (s *strict) any(at *yaml.Node) any {
	n, ok := s.enter(at)
	defer s.leave(at)
	if !ok {
		return nil
	}
	switch n.Kind {
	case yaml.MappingNode:
		entries := s.entries(n)
		m := make(map[string]any, len(entries))
		for _, e := range entries {
			s.push("." + e.name)
			m[e.name] = s.any(e.val)
			s.pop()
		}
		return m
	case yaml.SequenceNode:
		l := make([]any, len(n.Content))
		for i, item := range n.Content {
			s.push("[" + strconv.Itoa(i) + "]")
			l[i] = s.any(item)
			s.pop()
		}
		return l
	case yaml.ScalarNode:
		return scalarAny(n)
	}
	return nil
}

func scalarAny(n *yaml.Node) any {
	switch n.ShortTag() {
	case "!!null":
		return nil
	case "!!bool":
		if b, ok := boolOf(n); ok {
			return b
		}
	case "!!int":
		if i, err := intOf(n); err == nil {
			return i
		}
	case "!!float":
		var f float64
		if n.Decode(&f) == nil && !math.IsNaN(f) && !math.IsInf(f, 0) {
			return f
		}
	}
	return n.Value
}

func isNull(n *yaml.Node) bool {
	if n.Kind == yaml.AliasNode && n.Alias != nil {
		n = n.Alias
	}
	return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

// isString reports whether kubectl would see a string. It reads YAML 1.1, where
// an unquoted yes, no, on or off is a boolean; a plain time is a string.
func isString(n *yaml.Node) bool {
	if n.Kind != yaml.ScalarNode {
		return false
	}
	switch n.ShortTag() {
	case "!!str":
		_, legacy := legacyBools[n.Value]
		return !legacy || !isPlain(n)
	case "!!timestamp":
		return true
	}
	return false
}

func isPlain(n *yaml.Node) bool {
	return n.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle|yaml.TaggedStyle) == 0
}

var legacyBools = map[string]bool{
	"yes": true, "Yes": true, "YES": true, "on": true, "On": true, "ON": true,
	"no": false, "No": false, "NO": false, "off": false, "Off": false, "OFF": false,
}

func boolOf(n *yaml.Node) (val, ok bool) {
	if n.ShortTag() == "!!bool" {
		return n.Value == "true" || n.Value == "True" || n.Value == "TRUE", true
	}
	if b, legacy := legacyBools[n.Value]; legacy && isPlain(n) {
		return b, true
	}
	return false, false
}

var errNotInteger = errors.New("not an integer")

func intOf(n *yaml.Node) (int64, error) {
	if n.ShortTag() != "!!int" {
		return 0, errNotInteger
	}
	var i int64
	if err := n.Decode(&i); err != nil {
		return 0, strconv.ErrRange
	}
	return i, nil
}

// describe names what a node holds, for "expected a, found b".
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "an object"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	val := n.Value
	if len(val) > 40 {
		val = val[:40] + "..."
	}
	switch n.ShortTag() {
	case "!!null":
		return "nothing"
	case "!!int":
		return "integer " + val
	case "!!float":
		return "number " + val
	case "!!bool":
		return "boolean " + val
	}
	if !isString(n) {
		return "boolean " + val
	}
	return fmt.Sprintf("string %q", val)
}

func typeName(t reflect.Type) string {
	switch t {
	case quantityType:
		return "a quantity"
	case intstrType:
		return "an integer or a string"
	case timeType, microType:
		return "a time"
	case durationType:
		return "a duration"
	}
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "a boolean"
	case reflect.Float32, reflect.Float64:
		return "a number"
	}
	return "an integer"
}
