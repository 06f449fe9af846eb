package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/ebpf/cni"
)

const entry = `{"type":"ambit-cni","timeoutSeconds":30}`

const flannel = `{
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "vendor": {"z": 1.50, "a": 18446744073709551615},
  "plugins": [
    {
      "type": "flannel",
      "delegate": {"hairpinMode": true, "isDefaultGateway": true}
    },
    {
      "type": "portmap",
      "capabilities": {"portMappings": true}
    }
  ]
}
`

func TestChainedBehindTheOthers(t *testing.T) {
	for name, tc := range map[string]struct{ in, want string }{
		"laid out": {flannel, strings.Replace(flannel, "true}\n    }\n  ]", "true}\n    },\n    "+entry+"\n  ]", 1)},
		"on one line": {
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}]}`,
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"},` + entry + `]}`,
		},
		"one plugin, laid out": {
			"{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[\n\t{\"type\":\"ptp\"}\n]}",
			"{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[\n\t{\"type\":\"ptp\"},\n\t" + entry + "\n]}",
		},
		"list of versions": {
			`{"cniVersions":["0.4.0","1.1.0"],"name":"n","plugins":[{"type":"ptp"}]}`,
			`{"cniVersions":["0.4.0","1.1.0"],"name":"n","plugins":[{"type":"ptp"},` + entry + `]}`,
		},
		"there already, laid out otherwise": {
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}, {"type" : "ambit-cni", "timeoutSeconds":30}, {"type":"tuning"}]}`,
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}, {"type" : "ambit-cni", "timeoutSeconds":30}, {"type":"tuning"}]}`,
		},
		"there with other settings": {
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}, {"type":"ambit-cni"}, {"type":"tuning"}]}`,
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}, ` + entry + `, {"type":"tuning"}]}`,
		},
		"there twice": {
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}, {"type":"ambit-cni"}, {"type":"tuning"}, {"type":"ambit-cni"}]}`,
			`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}, ` + entry + `, {"type":"tuning"}]}`,
		},
	} {
		c, err := parse([]byte(tc.in))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := c.with([]byte(entry))
		if err != nil || string(got) != tc.want {
			t.Errorf("%s: %v\n%s\nwant\n%s", name, err, got, tc.want)
		}
	}
}

func TestTakenOut(t *testing.T) {
	for name, tc := range map[string]struct{ in, want string }{
		"last":             {`[{"type":"ptp"} , {"type":"ambit-cni"} ]`, `[{"type":"ptp"} ]`},
		"middle":           {`[{"type":"ptp"},{"type":"ambit-cni"}, {"type":"tuning"}]`, `[{"type":"ptp"}, {"type":"tuning"}]`},
		"first, and again": {`[ {"type":"ambit-cni"}, {"type":"ambit-cni"}, {"type":"ptp"}]`, `[ {"type":"ptp"}]`},
		"not there":        {`[{"type":"ptp"}]`, `[{"type":"ptp"}]`},
	} {
		wrap := func(s string) string { return `{"name":"n","cniVersion":"1.0.0","plugins":` + s + `}` }
		c, err := parse([]byte(wrap(tc.in)))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got, err := c.without(); err != nil || string(got) != wrap(tc.want) {
			t.Errorf("%s: %v, %s; want %s", name, err, got, wrap(tc.want))
		}
	}
	c, err := parse([]byte(`{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"ambit-cni"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.without(); !errors.Is(err, errOnlyOurs) {
		t.Errorf("a list of ours alone: %v", err)
	}
}

func TestConfigurationsThatAreNotEdited(t *testing.T) {
	for text, want := range map[string]string{
		``:                          "not JSON",
		`{"name`:                    "not JSON",
		`[]`:                        "not a JSON object",
		`{"name":"n","type":"ptp"}`: `no list "plugins"`,
		`{"name":"n","plugins":{}}`: `no list "plugins"`,
		`{"name":"n","plugins":[]}`: "empty",
		`{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"a"}],"plugins":[{"type":"b"}]}`: "twice",
		`{"name":"n","cniVersion":"1.0.0","plugins":[{"name":"a"}]}`:                          "plugins[0] has no type",
		`{"name":"n","cniVersion":"1.0.0","plugins":["a"]}`:                                   "plugins[0]",
		`{"cniVersion":"1.0.0","plugins":[{"type":"a"}]}`:                                     "no name",
		`{"name":"n","cniVersion":"0.2.0","plugins":[{"type":"a"}]}`:                          `"0.2.0"`,
		`{"name":"n","plugins":[{"type":"a"}]}`:                                               `cniVersion ""`,
		`{"name":"n","cniVersions":["1.0.0","7.0.0"],"plugins":[{"type":"a"}]}`:               `"7.0.0"`,
	} {
		if _, err := parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func TestListOfASingleConfiguration(t *testing.T) {
	conf := "{\n  \"cniVersion\": \"0.4.0\", \"name\": \"my \\\"net\\\"\",\n  \"type\": \"bridge\", \"mtu\": 1e3\n}\n"
	list, err := listOf([]byte(conf))
	if err != nil {
		t.Fatal(err)
	}
	c, err := parse(list)
	if err != nil {
		t.Fatalf("%v:\n%s", err, list)
	}
	if s := c.plugins[0]; string(list[s.from:s.to]) != strings.TrimSpace(conf) {
		t.Errorf("the plugin's own words changed: %s", list[s.from:s.to])
	}
	for _, bad := range []string{"{", `{"name":"n"}`, `{"name":"n","type":"x","plugins":[]}`} {
		if _, err := listOf([]byte(bad)); err == nil {
			t.Errorf("%s was taken for a single configuration", bad)
		}
	}
}

// FuzzConflist: editing keeps every other byte, is done once, and can be undone.
func FuzzConflist(f *testing.F) {
	f.Add([]byte(flannel))
	f.Add([]byte(`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"} ,	{"type":"ambit-cni"},{"type":"x"}],"z":[[]]}`))
	f.Add([]byte(`{"plugins":[{"type":"a","plugins":[]}],"cniVersions":["1.1.0"],"name":"n"}`))
	f.Add([]byte(`{"name":"n","cniVersion":"0.4.0","plugins":[{"type":"ambit-cni"},{"type":"ambit-cni"},{"type":"b"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parse(data)
		if err != nil {
			return
		}
		for _, s := range c.plugins {
			if !json.Valid(data[s.from:s.to]) {
				t.Fatalf("plugin %q is cut wrongly", data[s.from:s.to])
			}
		}
		with, err := c.with([]byte(entry))
		if err != nil {
			t.Fatal(err)
		}
		again, err := parse(with)
		if err != nil {
			t.Fatalf("edited to nonsense: %v: %s", err, with)
		}
		if len(again.ours) != 1 || len(again.plugins)-1 != len(c.plugins)-len(c.ours) {
			t.Fatalf("ours %v of %d plugins, was %v of %d", again.ours, len(again.plugins), c.ours, len(c.plugins))
		}
		if twice, err := again.with([]byte(entry)); err != nil || !bytes.Equal(twice, with) {
			t.Fatalf("%v: a second time it changed again: %s", err, twice)
		}
		without, err := again.without()
		if err != nil {
			if len(c.ours) != len(c.plugins) {
				t.Fatal(err)
			}
			return
		}
		if len(c.ours) == 0 && !bytes.Equal(without, data) {
			t.Fatalf("taken out again it is %q, was %q", without, data)
		}
		if bytes.Contains(without, []byte(`"type":"`+cni.Type)) && !bytes.Contains(data, []byte(cni.Type)) {
			t.Fatalf("something of ours is left: %s", without)
		}
	})
}
