package redirect

import "time"

// SetTTL shortens leases for a test.
func (l *Leases) SetTTL(d time.Duration) { l.ttl = d }
