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
	host  Hostname
	list  hamt.Vector[*Workload]
	index hamt.Index[string, place] // of a large list; empty for others, which are looked through
	// Healthy endpoints, and the largest capacity with the number of endpoints
	// that have it: what drawing at random needs to know beforehand.
	healthy    int
	maxCap     uint32
	maxCapHave int
}

// place is where an endpoint is in the list.
type place struct {
	w *Workload
	i int
}

var byPlace = &hamt.By[string, place]{Hash: hamt.HashString, Key: func(p *place) string { return p.w.UID }}

// Sizes of a list that gets an index, and of one that loses it.
const (
	large = 64
	small = large / 2
)

var noEndpoints EndpointSet

// Len is the number of endpoints, unhealthy ones included.
func (e *EndpointSet) Len() int { return e.list.Len() }

// Healthy is the number of healthy endpoints.
func (e *EndpointSet) Healthy() int { return e.healthy }

// At returns endpoint i.
func (e *EndpointSet) At(i int) Endpoint {
	w := e.at(i)
	return Endpoint{w, w.Services[e.host]}
}

func (e *EndpointSet) at(i int) *Workload { return *e.list.At(i) }

// Contains reports whether a workload is an endpoint.
func (e *EndpointSet) Contains(uid string) bool {
	if e.index.Len() > 0 {
		return e.index.Get(uid) != nil
	}
	for i := range e.list.Len() {
		if e.at(i).UID == uid {
			return true
		}
	}
	return false
}

// find is where w itself is in the list, -1 if it is not.
func (e *EndpointSet) find(w *Workload) int {
	if e.index.Len() > 0 {
		if p := e.index.Get(w.UID); p != nil {
			return p.i
		}
		return -1
	}
	for i := range e.list.Len() {
		if e.at(i) == w {
			return i
		}
	}
	return -1
}

func (e *EndpointSet) owned(ed *hamt.Edit) *EndpointSet {
	if e.edit == ed {
		return e
	}
	c := *e
	c.edit = ed
	return &c
}

// put adds w, or replaces old by it, which is the version before or nil. A nil set is empty.
func (e *EndpointSet) put(ed *hamt.Edit, host Hostname, w, old *Workload) *EndpointSet {
	i := -1
	switch {
	case e == nil:
		e = &EndpointSet{edit: ed, host: host, index: hamt.NewIndex(byPlace)}
	case old != nil:
		i = e.find(old)
	}
	e = e.owned(ed)
	if i < 0 {
		i = e.list.Len()
	} else {
		e.uncount(e.at(i))
	}
	e.count(w)
	e.move(ed, i, w)
	e.recount()
	return e
}

// move puts w at place i of the list.
func (e *EndpointSet) move(ed *hamt.Edit, i int, w *Workload) {
	e.list = e.list.Set(ed, i, w)
	switch {
	case e.index.Len() > 0:
		e.index = e.index.Set(ed, w.UID, place{w, i})
	case e.list.Len() > large:
		for i := range e.list.Len() {
			e.index = e.index.Set(ed, e.at(i).UID, place{e.at(i), i})
		}
	}
}

// remove fills the gap that old leaves with the last endpoint.
func (e *EndpointSet) remove(ed *hamt.Edit, old *Workload) *EndpointSet {
	i := e.find(old)
	if i < 0 {
		return e
	}
	e = e.owned(ed)
	e.uncount(e.at(i))
	if last := e.list.Len() - 1; i != last {
		e.move(ed, i, e.at(last))
	}
	e.list = e.list.Pop(ed)
	e.index = e.index.Delete(ed, old.UID)
	if e.list.Len() < small {
		e.index = hamt.NewIndex(byPlace)
	}
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
		switch c := e.at(i).Capacity; {
		case c > e.maxCap:
			e.maxCap, e.maxCapHave = c, 1
		case c == e.maxCap:
			e.maxCapHave++
		}
	}
}
