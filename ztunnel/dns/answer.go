package dns

import (
	"encoding/binary"

	"golang.org/x/net/dns/dnsmessage"
)

// negativeTTL bounds how long "no such record" is remembered: an endpoint that
// becomes healthy should be found soon.
const negativeTTL = 5

// appendAnswer encodes what the mesh says to m; limit bounds the message.
func (r *Resolver) appendAnswer(out []byte, m *message, a *answer, ttl uint32, limit int) []byte {
	w := writer{out: out, limit: limit, ttl: ttl}
	w.start(m, dnsmessage.RCodeSuccess, true)
	owner := theQuestion
	var ptr [2]byte
	if a.cname != nil {
		// The alias' target is written once and then pointed to.
		w.record(sectionAnswer, owner, dnsmessage.TypeCNAME, ttl, func(out []byte) []byte {
			binary.BigEndian.PutUint16(ptr[:], noName<<8|uint16(len(out)-w.base))
			return appendName(out, a.cname)
		})
		owner = ptr[:]
	}
	for _, addr := range a.addrs {
		w.address(sectionAnswer, owner, addr)
	}
	for i := range a.targets {
		t := &a.targets[i]
		if t.host != "" && !validName(t.host) || t.host == "" && !validName(t.svc) {
			continue
		}
		w.record(sectionAnswer, owner, dnsmessage.TypeSRV, ttl, func(out []byte) []byte {
			out = append(out, 0, 0, 0, 100) // priority, weight: all alike
			return t.appendHost(binary.BigEndian.AppendUint16(out, t.port))
		})
	}
	if len(a.addrs) == 0 && len(a.targets) == 0 {
		r.soa(&w, owner, a.cluster)
	}
	r.additional(&w, a)
	w.finish(m)
	return w.out
}

// soa makes "no such record" known for a while: RFC 2308 §2.2. The zone of a name
// outside the cluster's domain is the name itself, since who has the rest of it
// is not known here.
func (r *Resolver) soa(w *writer, owner []byte, cluster bool) {
	var zone [maxName + 2]byte
	if cluster {
		owner = appendName(zone[:0], []byte(r.domain))
	}
	w.record(sectionAuthority, owner, dnsmessage.TypeSOA, negativeTTL, func(out []byte) []byte {
		out = appendName(out, []byte("ns.dns."+r.domain))
		out = appendName(out, []byte("hostmaster."+r.domain))
		for _, n := range [...]uint32{1, 7200, 1800, 86400, negativeTTL} { // serial, refresh, retry, expire, minimum
			out = binary.BigEndian.AppendUint32(out, n)
		}
		return out
	})
}

// additional saves who asked for endpoints the next question. What does not fit
// is left out: RFC 2181 §9.
func (r *Resolver) additional(w *writer, a *answer) {
	for i := range a.targets {
		t := &a.targets[i]
		if !t.addr.IsValid() || w.full {
			continue
		}
		var name [maxName + 2]byte
		w.address(sectionAdditional, t.appendHost(name[:0]), t.addr)
	}
}

// appendError answers without records.
func appendError(out []byte, m *message, rcode dnsmessage.RCode) []byte {
	w := writer{out: out, limit: maxMessage}
	w.start(m, rcode, false)
	w.finish(m)
	return w.out
}
