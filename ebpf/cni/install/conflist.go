package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/ambit-mesh/ambit/ebpf/cni"
)

// errNoPlugins reports a configuration that is not a list.
var errNoPlugins = errors.New(`it has no list "plugins"`)

// span is a part of a document: data[from:to].
type span struct{ from, to int }

// conflist is a network configuration list that is edited as text: what is not ours
// stays as it was written, with its order, its numbers and its unknown fields.
type conflist struct {
	data    []byte
	plugins []span // the elements of "plugins"
	open    int    // just behind the list's bracket
	ours    []int  // indexes into plugins
	version string
}

// parse finds the plugins of a list.
func parse(data []byte) (*conflist, error) {
	if !json.Valid(data) {
		var v any
		err := json.Unmarshal(data, &v)
		return nil, fmt.Errorf("it is not JSON: %w", err)
	}
	c := &conflist{data: data}
	d := json.NewDecoder(bytes.NewReader(data))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("it is not a JSON object")
	}
	found := false
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return nil, err
		}
		if key != "plugins" {
			if _, err := skip(d, data); err != nil {
				return nil, err
			}
			continue
		}
		// Readers differ in which one they take.
		if found {
			return nil, errors.New(`it has "plugins" twice`)
		}
		found = true
		if err := c.readPlugins(d); err != nil {
			return nil, err
		}
	}
	if !found {
		return nil, errNoPlugins
	}
	if len(c.plugins) == 0 {
		return nil, errors.New("its list of plugins is empty")
	}
	return c, c.readHead()
}

func (c *conflist) readPlugins(d *json.Decoder) error {
	if t, err := d.Token(); err != nil || t != json.Delim('[') {
		return errNoPlugins
	}
	c.open = int(d.InputOffset())
	for d.More() {
		s, err := skip(d, c.data)
		if err != nil {
			return err
		}
		var head struct {
			Type string `json:"type"`
		}
		if err := json.Unmarshal(c.data[s.from:s.to], &head); err != nil {
			return fmt.Errorf("plugins[%d]: %w", len(c.plugins), err)
		}
		if head.Type == "" {
			return fmt.Errorf("plugins[%d] has no type", len(c.plugins))
		}
		if head.Type == cni.Type {
			c.ours = append(c.ours, len(c.plugins))
		}
		c.plugins = append(c.plugins, s)
	}
	_, err := d.Token() // ]
	return err
}

// skip reads one value and returns where it stands.
func skip(d *json.Decoder, data []byte) (span, error) {
	var raw json.RawMessage
	if err := d.Decode(&raw); err != nil {
		return span{}, err
	}
	to := int(d.InputOffset())
	return span{from: to - len(raw), to: to}, nil
}

// readHead learns the version, which has to be one that our plugin speaks: a runtime
// would call us in it, and no pod would start.
func (c *conflist) readHead() error {
	var head struct {
		Name        string   `json:"name"`
		CNIVersion  string   `json:"cniVersion"`
		CNIVersions []string `json:"cniVersions"`
	}
	if err := json.Unmarshal(c.data, &head); err != nil {
		return err
	}
	if head.Name == "" {
		return errors.New("it has no name")
	}
	versions := head.CNIVersions
	if head.CNIVersion != "" || len(versions) == 0 {
		versions = append(versions, head.CNIVersion)
	}
	for _, v := range versions {
		if !slices.Contains(cni.Versions().SupportedVersions(), v) {
			return fmt.Errorf("its cniVersion %q is none that %s speaks (%v)", v, cni.Type, cni.Versions().SupportedVersions())
		}
	}
	c.version = head.CNIVersion
	return nil
}

// with returns the document with entry as our plugin, once: where it stands already,
// or behind all others.
func (c *conflist) with(entry []byte) ([]byte, error) {
	if len(c.ours) == 0 {
		end := c.plugins[len(c.plugins)-1].to
		return splice(c.data, end, end, slices.Concat(c.separator(), entry)), nil
	}
	if len(c.ours) > 1 {
		rest, err := parse(c.cut(c.ours[len(c.ours)-1]))
		if err != nil {
			return nil, err
		}
		return rest.with(entry)
	}
	first := c.plugins[c.ours[0]]
	if same(c.data[first.from:first.to], entry) {
		return c.data, nil
	}
	return splice(c.data, first.from, first.to, entry), nil
}

// errOnlyOurs reports a list that has no plugin but ours.
var errOnlyOurs = errors.New("it has no plugin but " + cni.Type)

// without returns the document without our plugin.
func (c *conflist) without() ([]byte, error) {
	if len(c.ours) == 0 {
		return c.data, nil
	}
	if len(c.plugins) == 1 {
		return nil, errOnlyOurs
	}
	rest, err := parse(c.cut(c.ours[len(c.ours)-1]))
	if err != nil {
		return nil, err
	}
	return rest.without()
}

// cut removes one of several plugins together with what separates it from its
// neighbour.
func (c *conflist) cut(i int) []byte {
	if i > 0 {
		return splice(c.data, c.plugins[i-1].to, c.plugins[i].to, nil)
	}
	return splice(c.data, c.plugins[0].from, c.plugins[1].from, nil)
}

// separator is what the document's author writes between two plugins.
func (c *conflist) separator() []byte {
	if len(c.plugins) > 1 {
		return c.data[c.plugins[0].to:c.plugins[1].from]
	}
	lead := c.data[c.open:c.plugins[0].from]
	return append([]byte{','}, lead...)
}

func splice(data []byte, from, to int, with []byte) []byte {
	return slices.Concat(data[:from], with, data[to:])
}

// same reports whether two documents say the same, however they are laid out.
func same(a, b []byte) bool {
	var ca, cb bytes.Buffer
	if json.Compact(&ca, a) != nil || json.Compact(&cb, b) != nil {
		return false
	}
	return bytes.Equal(ca.Bytes(), cb.Bytes())
}

// listOf makes a list of a configuration of a single plugin, as runtimes do with it
// in memory.
func listOf(conf []byte) ([]byte, error) {
	var head struct {
		Name       string          `json:"name"`
		CNIVersion string          `json:"cniVersion"`
		Type       string          `json:"type"`
		Plugins    json.RawMessage `json:"plugins"`
	}
	if err := json.Unmarshal(conf, &head); err != nil {
		return nil, fmt.Errorf("it is not JSON: %w", err)
	}
	if head.Type == "" || head.Plugins != nil {
		return nil, errors.New("it is not the configuration of a single plugin (a list belongs into a .conflist)")
	}
	name, err := json.Marshal(head.Name)
	if err != nil {
		return nil, err
	}
	version, err := json.Marshal(head.CNIVersion)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	for _, part := range [][]byte{
		[]byte("{\n  \"name\": "), name, []byte(",\n  \"cniVersion\": "), version,
		[]byte(",\n  \"plugins\": [\n"), bytes.TrimSpace(conf), []byte("\n  ]\n}\n"),
	} {
		_, _ = out.Write(part) // into memory
	}
	return out.Bytes(), nil
}
