package store

import (
	"hash/maphash"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/client"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

// raws remembers which bytes became what is in force. A control plane that does not know what its proxies have sends all
// of it again; bytes that are known need not be decoded to find that out.
//
// The writer owns it.
type raws struct {
	seeds [2]maphash.Seed
	known map[string]raw // by resource name
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

// stands reports whether k is what is in force, or held back, under its own name.
func (e *edit) stands(k raw) bool {
	switch {
	case k.workload != nil:
		uid := k.workload.UID
		if h, held := e.s.held[uid]; held {
			return h.w == k.workload
		}
		return e.mesh.Workload(uid) == k.workload
	case k.service != nil:
		return e.mesh.Service(k.service.Host) == k.service
	}
	return false
}

// address applies one workload or service, unless its bytes are those that stand.
func (e *edit) address(r client.Resource) error {
	k, known := e.s.raws.known[r.Name]
	sum := e.s.raws.sum(r.Value)
	if known && r.TypeURL == api.AddressType && k.sum == sum && e.stands(k) {
		return nil
	}
	k, err := e.decoded(r)
	if err != nil {
		delete(e.s.raws.known, r.Name) // it is refused as often as it comes
		return err
	}
	k.sum = sum
	e.s.raws.known[r.Name] = k
	return nil
}
