package store

import (
	"hash/maphash"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/client"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

// raws remembers which bytes became what is in force. A control plane that does not know what its proxies have sends all
// of it again; bytes that are known need not be decoded to find that out. A workload remembers its own.
//
// The writer owns it.
type raws struct {
	seeds [2]maphash.Seed
	known map[string]raw // by resource name; no workload whose bytes its Source tells
}

// raw is the last value of a name. What came of it tells whether that still stands: another name may have replaced it.
type raw struct {
	sum      [2]uint64 // seeds are drawn, so that nobody can choose values that meet
	workload *mesh.Workload
	service  *mesh.Service
}

func newRaws() raws {
	return raws{seeds: [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()}, known: map[string]raw{}}
}

func (r *raws) sum(value []byte) [2]uint64 {
	return [2]uint64{maphash.Bytes(r.seeds[0], value), maphash.Bytes(r.seeds[1], value)}
}

// latest is the version of a workload that is in force or held back, nil if there is none.
func (e *edit) latest(uid string) *mesh.Workload {
	if h, held := e.s.held[uid]; held {
		return h.w
	}
	return e.mesh.Workload(uid)
}

// stands reports whether bytes that came under a name, with that sum, are what is in force or held back.
func (e *edit) stands(name string, sum [2]uint64) bool {
	if w := e.latest(name); w != nil && w.Source == sum {
		return true
	}
	k, known := e.s.raws.known[name]
	switch {
	case !known || k.sum != sum:
		return false
	case k.workload != nil:
		return e.latest(k.workload.UID) == k.workload
	case k.service != nil:
		return e.mesh.Service(k.service.Host) == k.service
	}
	return false
}

// address applies one workload or service, unless its bytes are those that stand.
func (e *edit) address(r client.Resource) error {
	sum := e.s.raws.sum(r.Value)
	if r.TypeURL == api.AddressType && e.stands(r.Name, sum) {
		return nil
	}
	k, err := e.decoded(r, sum)
	if err != nil || k.workload != nil && k.workload.UID == r.Name && k.workload.Source == sum {
		delete(e.s.raws.known, r.Name) // refused, it is so as often as it comes
		return err
	}
	e.s.raws.known[r.Name] = k
	return nil
}
