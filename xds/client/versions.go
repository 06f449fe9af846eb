package client

import (
	"iter"
	"strings"

	"github.com/ambit-mesh/ambit/xds/hamt"
)

// versions are the versions of resources, by name.
type versions struct {
	x  hamt.Index[string, inForce]
	ed *hamt.Edit // there is no other version of x
}

// inForce is what is known of a resource.
type inForce struct {
	name    string
	version string // "" when the last one was refused
}

// newInForce makes one string of both, in which each is a part: those of a whole mesh are megabytes, and the handler
// keeps the name as well.
func newInForce(name, version []byte) inForce {
	var b strings.Builder
	b.Grow(len(name) + len(version))
	b.Write(name)
	b.Write(version)
	text := b.String()
	return inForce{text[:len(name)], text[len(name):]}
}

var byName = &hamt.By[string, inForce]{Hash: hamt.HashString, Key: func(f *inForce) string { return f.name }}

func newVersions() versions { return versions{hamt.NewIndex(byName), &hamt.Edit{}} }

func (v *versions) len() int                 { return v.x.Len() }
func (v *versions) get(name string) *inForce { return v.x.Get(name) }

// like is get for a name that is no string yet.
func (v *versions) like(name []byte) *inForce {
	return v.x.Find(hamt.HashBytes(name), func(f *inForce) bool { return f.name == string(name) })
}

func (v *versions) set(f inForce)           { v.x = v.x.Set(v.ed, f.name, f) }
func (v *versions) drop(name string)        { v.x = v.x.Delete(v.ed, name) }
func (v *versions) all() iter.Seq[*inForce] { return v.x.All() }
