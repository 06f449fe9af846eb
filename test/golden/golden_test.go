package golden

import (
	"testing"

	"github.com/ambit-mesh/ambit/xds/api/security"
)

func TestArchive(t *testing.T) {
	Run(t, "testdata/*.txtar", func(t *testing.T, a *Archive) {
		if len(a.Commands) != 2 || a.Commands[1][1] != "two" {
			t.Errorf("commands %q", a.Commands)
		}
		a.Want("copy", string(a.File("in.txt")))
		a.Want("proto", Proto(&security.Authorization{
			Name: "a", Action: security.Action_DENY,
			Rules: []*security.Rule{{Clauses: []*security.Clause{{Matches: []*security.Match{{
				SourceIps: []*security.Address{{Address: []byte{10, 0, 0, 1}, Length: 8}}, DestinationPorts: []uint32{80, 81},
			}}}}}},
		}))
	})
}
