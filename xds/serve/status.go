package serve

import (
	"cmp"
	"slices"
	"time"

	"github.com/ambit-mesh/ambit/xds/delta"
)

// Proxy is a connected proxy, for status pages.
type Proxy struct {
	Node      string             `json:"node"` // the id it gave itself
	Caller    string             `json:"caller"`
	OnNode    string             `json:"on_node,omitempty"`
	Peer      string             `json:"peer"`
	Connected time.Time          `json:"connected"`
	Synced    bool               `json:"synced"` // all that is stored now was acknowledged
	NackTime  *time.Time         `json:"last_nack_time,omitempty"`
	Types     []delta.TypeStatus `json:"types"`
}

// Proxies lists the open streams, by node id.
func (s *Server) Proxies() []Proxy {
	s.mu.Lock()
	open := make([]*stream, 0, len(s.streams))
	for st := range s.streams {
		open = append(open, st)
	}
	s.mu.Unlock()
	out := make([]Proxy, 0, len(open))
	for _, st := range open {
		out = append(out, st.status())
	}
	slices.SortFunc(out, func(a, b Proxy) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), a.Connected.Compare(b.Connected))
	})
	return out
}

func (st *stream) status() Proxy {
	st.mu.Lock()
	defer st.mu.Unlock()
	p := Proxy{
		Node: st.node, Caller: st.caller.Account(), OnNode: st.caller.Node, Peer: st.peer,
		Connected: st.since.UTC(), Types: st.state.Status(), Synced: st.state.Synced(),
	}
	if !st.nackTime.IsZero() {
		t := st.nackTime.UTC()
		p.NackTime = &t
	}
	return p
}
