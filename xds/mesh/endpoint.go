package mesh

import "github.com/ambit-mesh/ambit/xds/hamt"

// Endpoint is a workload that serves a service, with the port mapping it has
// for that service.
type Endpoint struct {
	Workload *Workload
	Ports    []Port
}

// EndpointSet is the endpoints of a service in no particular order. It is
// immutable once its transaction is committed.
type EndpointSet struct {
	edit  *hamt.Edit
	list  hamt.Vector[Endpoint]
	index hamt.Map[string, int] // uid → position in list
	// Healthy endpoints, and the largest capacity with the number of endpoints
	// that have it: what drawing at random needs to know beforehand.
	healthy    int
	maxCap     uint32
	maxCapHave int
}

var noEndpoints EndpointSet

// Len is the number of endpoints, unhealthy ones included.
func (e *EndpointSet) Len() int { return e.list.Len() }

// Healthy is the number of healthy endpoints.
func (e *EndpointSet) Healthy() int { return e.healthy }

// At returns endpoint i.
func (e *EndpointSet) At(i int) Endpoint { return *e.list.At(i) }

// Contains reports whether a workload is an endpoint.
func (e *EndpointSet) Contains(uid string) bool {
	if e.index.Len() == 0 {
		return false
	}
	_, ok := e.index.Get(uid)
	return ok
}

func (e *EndpointSet) owned(ed *hamt.Edit) *EndpointSet {
	if e == nil {
		return &EndpointSet{edit: ed, index: hamt.NewMap[string, int](hamt.HashString)}
	}
	if e.edit == ed {
		return e
	}
	c := *e
	c.edit = ed
	return &c
}

// put adds or replaces the endpoint of a workload.
func (e *EndpointSet) put(ed *hamt.Edit, ep Endpoint) *EndpointSet {
	e = e.owned(ed)
	i, known := e.index.Get(ep.Workload.UID)
	if !known {
		i = e.list.Len()
		e.index = e.index.Set(ed, ep.Workload.UID, i)
	} else {
		e.uncount(e.list.At(i).Workload)
	}
	e.count(ep.Workload)
	e.list = e.list.Set(ed, i, ep)
	e.recount()
	return e
}

// remove fills the gap with the last endpoint.
func (e *EndpointSet) remove(ed *hamt.Edit, uid string) *EndpointSet {
	i, known := e.index.Get(uid)
	if !known {
		return e
	}
	e = e.owned(ed)
	e.uncount(e.list.At(i).Workload)
	last := *e.list.At(e.list.Len() - 1)
	if last.Workload.UID != uid {
		e.list = e.list.Set(ed, i, last)
		e.index = e.index.Set(ed, last.Workload.UID, i)
	}
	e.list = e.list.Pop(ed)
	e.index = e.index.Delete(ed, uid)
	e.recount()
	return e
}

func (e *EndpointSet) count(w *Workload) {
	if w.Healthy {
		e.healthy++
	}
	switch {
	case w.Capacity > e.maxCap:
		e.maxCap, e.maxCapHave = w.Capacity, 1
	case w.Capacity == e.maxCap:
		e.maxCapHave++
	}
}

func (e *EndpointSet) uncount(w *Workload) {
	if w.Healthy {
		e.healthy--
	}
	if w.Capacity == e.maxCap {
		e.maxCapHave--
	}
}

// recount looks through all endpoints only when the last one with the largest
// capacity went away, which is rare: capacities are nearly always 1.
func (e *EndpointSet) recount() {
	if e.maxCapHave > 0 {
		return
	}
	e.maxCap = 0
	for i := range e.list.Len() {
		switch c := e.list.At(i).Workload.Capacity; {
		case c > e.maxCap:
			e.maxCap, e.maxCapHave = c, 1
		case c == e.maxCap:
			e.maxCapHave++
		}
	}
}
