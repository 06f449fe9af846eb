// Package delta is the server side of delta xDS without the wire: what is
// served (Store) and, per stream, what a client has been told (Stream).
//
//	derive ─▶ Store.Apply ─▶ [ history of changes, per type ]
//	                                   ▲ cursor
//	request ─▶ Stream.Request ─▶ Stream ─ Stream.Next ─▶ response
//
// A wildcard stream is little more than a cursor into the history: a resource
// that changes again before it was sent moves to the end, so changes merge for
// a slow client by themselves and its backlog costs no memory. Removals are
// remembered up to a bound; a client that falls behind it gets ErrBehind, is
// disconnected and resumes by initial_resource_versions.
//
// Order. Types are given dependencies first (policies before the workloads
// that name them). A response of a type is made only when everything of the
// types before it has been sent, and removals go the other way round, so that
// at no moment a client knows a reference without its target: a client that
// ignores unknown references would allow what it should deny, and one that
// denies on them would cut connections.
//
// Readiness. Node proxies take the first response of a type for the whole
// state, so it is never split below FirstBytes; later ones are.
//
// A Store is safe for concurrent use, with one caller of Apply at a time. A
// Stream belongs to one goroutine (or lock). Neither reads a clock, starts a
// goroutine or knows gRPC.
//
// Protocol: https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol#incremental-xds
package delta

import "errors"

// ErrBehind says that a client missed removals that are forgotten by now: end
// the stream, the client resumes from what it has.
var ErrBehind = errors.New("client is too far behind to be told every removal")

// RequestError says that a client's request breaks the protocol or a limit.
type RequestError struct{ Reason string }

func (e *RequestError) Error() string { return "discovery request: " + e.Reason }
