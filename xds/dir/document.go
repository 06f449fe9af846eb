package dir

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/ambit-mesh/ambit/xds/crd"
)

// id is an object's key in this package: kinds of two groups may share a name.
type id struct{ group, kind, namespace, name string }

// content is what a piece of a file holds.
type content struct {
	objects    []*Object
	use        []use // of each object
	failed     []id  // objects that are there and cannot be used: their last good version stays
	broken     bool  // something is there that does not say what it is
	problems   []Problem
	unenforced []string // kinds of objects that this build accepts and does not enforce
}

func (c *content) add(d content) {
	c.objects = append(c.objects, d.objects...)
	c.use = append(c.use, d.use...)
	c.failed = append(c.failed, d.failed...)
	c.broken = c.broken || d.broken
	c.problems = append(c.problems, d.problems...)
	c.unenforced = append(c.unenforced, d.unenforced...)
}

// chunk is one YAML document of a file, its "---" line included.
type chunk struct {
	line int // of its first byte in the file, 1-based
	data []byte
}

// split cuts a file at "---" lines, as kubectl does, so that a syntax error costs
// one document only. YAML allows "---" at the start of a line nowhere else.
func split(data []byte) []chunk {
	var out []chunk
	start, startLine, line, text := 0, 1, 1, false
	for pos := 0; pos < len(data); line++ {
		end := len(data)
		if i := bytes.IndexByte(data[pos:], '\n'); i >= 0 {
			end = pos + i + 1
		}
		l := bytes.TrimRight(data[pos:end], " \t\r\n")
		if isSeparator(l) && text {
			out = append(out, chunk{startLine, data[start:pos]})
			start, startLine, text = pos, line, false
		}
		// Directives and comments alone belong to the document that follows.
		text = text || (len(l) > 0 && l[0] != '#' && l[0] != '%' && !bytes.Equal(l, []byte("---")))
		pos = end
	}
	if text {
		out = append(out, chunk{startLine, data[start:]})
	}
	return out
}

func isSeparator(line []byte) bool {
	rest, ok := bytes.CutPrefix(line, []byte("---"))
	return ok && (len(rest) == 0 || rest[0] == ' ' || rest[0] == '\t')
}

// document decodes one document. Lines are relative to the document.
type document struct {
	file string
	out  content
}

func decodeChunk(file string, data []byte) (out content) {
	d := &document{file: file}
	defer func() {
		// The YAML parser is not ours, and a file must never end the process.
		if r := recover(); r != nil {
			d.out.problems = append(d.out.problems, Problem{File: file, Line: 1, Message: fmt.Sprintf("the YAML parser gave up: %v", r)})
			d.out.broken = true
		}
		out = d.out
	}()
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var n yaml.Node
		err := dec.Decode(&n)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			line, msg := syntaxError(err)
			d.unreadable(line, msg, "")
			return
		}
		if n.Kind == yaml.DocumentNode && len(n.Content) == 1 && !isNull(n.Content[0]) {
			d.root(n.Content[0], schema.GroupVersionKind{}, 0)
		}
	}
}

// syntaxError takes the line out of the parser's message.
func syntaxError(err error) (line int, msg string) {
	msg = strings.TrimPrefix(err.Error(), "yaml: ")
	if _, serr := fmt.Sscanf(msg, "line %d:", &line); serr == nil {
		_, msg, _ = strings.Cut(msg, ": ")
	}
	return max(line, 1), "YAML syntax: " + msg
}

// unreadable reports a document that does not say which object it is.
func (d *document) unreadable(line int, msg, hint string) {
	d.out.broken = true
	d.out.problems = append(d.out.problems, Problem{File: d.file, Line: line, Message: msg, Hint: hint})
}

// root decodes an object or a list of them. inherited is the kind of list items.
func (d *document) root(n *yaml.Node, inherited schema.GroupVersionKind, depth int) {
	if n.Kind == yaml.AliasNode && n.Alias != nil {
		n = n.Alias
	}
	if n.Kind != yaml.MappingNode {
		d.unreadable(n.Line, "expected an object with apiVersion and kind, found "+describe(n), "")
		return
	}
	apiVersion, kind := field(n, "apiVersion"), field(n, "kind")
	gv, err := schema.ParseGroupVersion(apiVersion)
	if err != nil {
		d.unreadable(n.Line, fmt.Sprintf("apiVersion %q: expected group/version", apiVersion), "")
		return
	}
	gvk := gv.WithKind(kind)
	if apiVersion == "" && kind == "" {
		gvk = inherited
	}
	switch {
	case gvk.Kind == "":
		d.unreadable(n.Line, "kind is missing", "")
	case gvk.Version == "":
		d.unreadable(n.Line, "apiVersion is missing", "")
	default:
		if item, ok := strings.CutSuffix(gvk.Kind, "List"); ok {
			d.list(n, gvk, item, depth)
			return
		}
		d.object(n, gvk)
	}
}

func (d *document) list(n *yaml.Node, gvk schema.GroupVersionKind, item string, depth int) {
	if depth > 2 {
		d.unreadable(n.Line, "lists in lists in lists", "")
		return
	}
	inherited := schema.GroupVersionKind{}
	if item != "" {
		inherited = schema.GroupVersionKind{Group: gvk.Group, Version: gvk.Version, Kind: item}
		if _, problem, hint := findKind(inherited); problem != "" {
			d.unreadable(n.Line, problem, hint)
			return
		}
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		val := n.Content[i+1]
		switch name := n.Content[i].Value; {
		case name == "apiVersion" || name == "kind" || name == "metadata":
		case name != "items":
			d.unreadable(n.Content[i].Line, fmt.Sprintf("unknown field %q of a %s", name, gvk.Kind), didYouMean(name, []string{"items", "metadata"}))
		case val.Kind != yaml.SequenceNode:
			if !isNull(val) {
				d.unreadable(val.Line, "items: expected a list, found "+describe(val), "")
			}
		default:
			for _, it := range val.Content {
				d.root(it, inherited, depth+1)
			}
		}
	}
}

// object decodes one object strictly.
func (d *document) object(n *yaml.Node, gvk schema.GroupVersionKind) {
	var meta metav1.ObjectMeta
	name, namespace := nameOf(n)
	info, problem, hint := findKind(gvk)
	if info == nil {
		d.out.broken = true // it may be a slip in an object that was good before
		d.out.problems = append(d.out.problems, Problem{File: d.file, Line: n.Line, Kind: gvk.Kind, Namespace: namespace, Name: name, Message: problem, Hint: hint})
		return
	}
	if info.cluster {
		namespace = ""
	} else if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	me := id{gvk.Group, gvk.Kind, namespace, name}
	s := &strict{}
	var value any
	if info.typ != nil {
		p := reflect.New(info.typ)
		s.decode(n, p.Interface())
		value = p.Interface()
		om := value.(metav1.Object)
		om.SetNamespace(namespace)
	} else {
		s.envelope(n, &meta)
	}
	s.checkName(n, me, info)
	if v, ok := value.(crd.Validator); ok && len(s.faults) == 0 {
		for _, f := range v.Validate() {
			s.faults = append(s.faults, fault{lineOf(n, f.Path), f})
		}
	}
	if len(s.faults) > 0 {
		d.fail(me, s.faults)
		if gvk.Kind == "ConfigMap" && name == meshConfigName { // and with it what it holds
			d.out.failed = append(d.out.failed, meshConfigID(namespace))
		}
		return
	}
	o := &Object{GVK: gvk, Namespace: namespace, Name: name, File: d.file, Line: n.Line, Value: value}
	switch info.use {
	case unenforced:
		d.out.unenforced = append(d.out.unenforced, info.name())
		return
	case irrelevant:
		d.meshConfig(n, o)
		if value == nil {
			return
		}
	}
	d.out.objects = append(d.out.objects, o)
	d.out.use = append(d.out.use, info.use)
}

func (d *document) fail(me id, faults []fault) {
	if me.name == "" {
		d.out.broken = true
	}
	d.out.failed = append(d.out.failed, me)
	for _, f := range faults {
		d.out.problems = append(d.out.problems, Problem{
			File: d.file, Line: f.line, Kind: me.kind, Namespace: me.namespace, Name: me.name,
			Path: f.Path, Message: f.Message, Hint: f.Hint,
		})
	}
}

// envelope checks an object of which only the metadata is read.
func (s *strict) envelope(n *yaml.Node, meta *metav1.ObjectMeta) {
	for _, e := range s.entries(n) {
		s.push("." + e.name)
		if e.name == "metadata" {
			s.value(e.val, reflect.ValueOf(meta).Elem())
		} else {
			s.any(e.val)
		}
		s.pop()
	}
}

func (s *strict) checkName(n *yaml.Node, me id, info *kindInfo) {
	s.path = []string{".metadata"}
	defer func() { s.path = nil }()
	switch {
	case me.name == "":
		s.fault(n, "", "name is missing")
	case len(validation.IsDNS1123Subdomain(me.name)) > 0 && info.group != "rbac.authorization.k8s.io":
		s.push(".name")
		s.fault(n, "use lower case letters, digits, '-' and '.'", "%q is not a valid name", me.name)
	case me.namespace != "" && len(validation.IsDNS1123Label(me.namespace)) > 0:
		s.push(".namespace")
		s.fault(n, "use lower case letters, digits and '-'", "%q is not a valid namespace", me.namespace)
	}
}

// meshConfigName is the ConfigMap whose key `mesh` is the mesh configuration.
const meshConfigName = "istio"

func meshConfigID(namespace string) id {
	return id{crd.MeshGroup, crd.MeshConfigKind, namespace, meshConfigName}
}

// meshConfig decodes the key `mesh` of a ConfigMap named `istio` as an object of
// its own, so that a mistake in it leaves the last good configuration in force.
func (d *document) meshConfig(n *yaml.Node, cm *Object) {
	if cm.GVK.Kind != "ConfigMap" || cm.Name != meshConfigName {
		return
	}
	key := find(find(n, "data"), "mesh")
	if key == nil || key.Kind != yaml.ScalarNode {
		return
	}
	gvk := schema.GroupVersionKind{Group: crd.MeshGroup, Version: "v1alpha1", Kind: crd.MeshConfigKind}
	me := meshConfigID(cm.Namespace)
	line := key.Line
	if key.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0 {
		line++ // the text starts below the "|"
	}
	mesh := &crd.Mesh{ObjectMeta: *cm.Value.(metav1.ObjectMetaAccessor).GetObjectMeta().(*metav1.ObjectMeta)}
	s := &strict{path: []string{"data.mesh"}}
	var doc yaml.Node
	if err := yaml.Unmarshal([]byte(key.Value), &doc); err != nil {
		at, msg := syntaxError(err)
		d.fail(me, []fault{{line + at - 1, crd.Fault{Path: "data.mesh", Message: msg}}})
		return
	}
	if len(doc.Content) == 1 {
		s.decode(doc.Content[0], &mesh.Config)
	}
	if len(s.faults) == 0 {
		for _, f := range mesh.Config.Validate() {
			at := 1
			if len(doc.Content) == 1 {
				at = lineOf(doc.Content[0], f.Path)
			}
			f.Path = "data.mesh." + f.Path
			s.faults = append(s.faults, fault{at, f})
		}
	}
	if len(s.faults) > 0 {
		for i := range s.faults {
			s.faults[i].line += line - 1
		}
		d.fail(me, s.faults)
		return
	}
	d.out.objects = append(d.out.objects, &Object{GVK: gvk, Namespace: cm.Namespace, Name: cm.Name, File: d.file, Line: line, Value: mesh})
	d.out.use = append(d.out.use, enforced)
}

// find returns the value of a key of a mapping, nil without one.
func find(n *yaml.Node, key string) *yaml.Node {
	if n != nil && n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

func field(n *yaml.Node, key string) string {
	if v := find(n, key); v != nil && v.Kind == yaml.ScalarNode {
		return v.Value
	}
	return ""
}

func nameOf(n *yaml.Node) (name, namespace string) {
	meta := find(n, "metadata")
	return field(meta, "name"), field(meta, "namespace")
}

// lineOf finds the line of a field path such as spec.rules[0].from, or of the
// deepest part of it that exists.
func lineOf(n *yaml.Node, path string) int {
	line := n.Line
	for _, seg := range strings.FieldsFunc(path, func(r rune) bool { return r == '.' || r == '[' || r == ']' }) {
		if n.Kind == yaml.AliasNode && n.Alias != nil {
			n = n.Alias
		}
		var next *yaml.Node
		if n.Kind == yaml.SequenceNode {
			var i int
			if _, err := fmt.Sscanf(seg, "%d", &i); err == nil && i >= 0 && i < len(n.Content) {
				next = n.Content[i]
			}
		} else {
			next = find(n, seg)
		}
		if next == nil {
			return line
		}
		n, line = next, next.Line
	}
	return line
}

// Decode reads one file's content: every object whose kind has a Go type here
// (also those the mesh does not need, such as Deployments) and every problem.
func Decode(file string, data []byte) ([]*Object, []Problem) {
	c := decodeFile(file, data)
	return c.objects, c.problems
}

func decodeFile(file string, data []byte) content {
	var out content
	for _, ch := range split(data) {
		c := decodeChunk(file, ch.data)
		c.shift(ch.line - 1)
		out.add(c)
	}
	sortProblems(out.problems)
	return out
}

// shift turns lines of a document into lines of its file. The content must not
// be shared yet.
func (c *content) shift(lines int) {
	for _, o := range c.objects {
		o.Line += lines
	}
	for i := range c.problems {
		c.problems[i].Line += lines
	}
}

func sortProblems(ps []Problem) {
	slices.SortStableFunc(ps, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line))
	})
}
