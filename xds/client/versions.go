package client

import (
	"iter"

	"github.com/ambit-mesh/ambit/xds/hamt"
)

// versions are the versions of resources, by name. Names and versions of a whole mesh are megabytes: each pair is one
// string, of which the handler's name of the resource is a part.
type versions struct {
	x  hamt.Index[string, inForce]
	ed *hamt.Edit // there is no other version of x
}

// inForce is what is known of a resource: its name, followed by its version.
type inForce struct {
	text string
	name int // how long the name is
}

func newInForce(name, version []byte) inForce {
	b := make([]byte, 0, len(name)+len(version))
	return inForce{string(append(append(b, name...), version...)), len(name)}
}

func (f *inForce) named() string { return f.text[:f.name] }

// version is "" when the last one was refused.
func (f *inForce) version() string { return f.text[f.name:] }

var byName = &hamt.By[string, inForce]{Hash: hamt.HashString, Key: (*inForce).named}

func newVersions() versions { return versions{hamt.NewIndex(byName), &hamt.Edit{}} }

func (v *versions) len() int                 { return v.x.Len() }
func (v *versions) get(name string) *inForce { return v.x.Get(name) }

// like is get for a name that is no string yet.
func (v *versions) like(name []byte) *inForce {
	return v.x.Find(hamt.HashBytes(name), func(f *inForce) bool { return f.named() == string(name) })
}

func (v *versions) set(f inForce)           { v.x = v.x.Set(v.ed, f.named(), f) }
func (v *versions) drop(name string)        { v.x = v.x.Delete(v.ed, name) }
func (v *versions) all() iter.Seq[*inForce] { return v.x.All() }
