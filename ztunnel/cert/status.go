package cert

import (
	"cmp"
	"slices"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
)

// Status of one identity, for /config_dump.
type Status struct {
	ID           identity.ID
	State        string // Available, Initializing, Unavailable: <why>
	Cert         *Certificate
	FailingSince time.Time
}

// Status lists the identities, ordered by name.
func (m *Manager) Status() []Status {
	m.mu.RLock()
	defer m.mu.RUnlock()
	now := m.cfg.Now()
	out := make([]Status, 0, len(m.entries))
	for id, e := range m.entries {
		s := Status{ID: id, Cert: e.cert.Load(), FailingSince: e.failing}
		switch {
		case s.Cert.Valid(now):
			s.State = "Available"
		case e.err != nil:
			s.State = "Unavailable: " + e.err.Error()
		default:
			s.State = "Initializing"
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b Status) int { return cmp.Compare(a.ID.String(), b.ID.String()) })
	return out
}
