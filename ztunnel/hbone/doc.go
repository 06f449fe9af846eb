// Package hbone carries TCP connections through HTTP/2 CONNECT streams over mutual TLS: the mesh's wire protocol.
//
//	Dialer.Connect ─► tunnelSet (per Key) ─► tunnel ═ TLS ═► tunnel ─► Server's Handler ─► Request.Accept
//	       └──────────────── Stream (net.Conn) ◄──── DATA ────► Stream (net.Conn) ────────────────┘
//
// It knows TLS and headers, not policy: who may connect where is decided by its callers, and who the peer is by the
// tls.Config they hand in.
//
// # Concurrency
//
// A tunnel has one reader goroutine, which parses frames and owns all inbound connection state. Nobody owns writing:
// whoever has frames to send appends them to the tunnel's queue and, if nobody is flushing, flushes. The reader never
// flushes itself, because two peers' readers waiting for each other's reads would deadlock. What it has decrypted it
// writes to the applications' sockets, as far as they take it without waiting (Stream.DeliverTo); a goroutine carries on
// where one takes no more. A tunnel's keepalive and idle timeout run on one timer. Locks are taken in the order dialer,
// set, tunnel, stream, writer; none is held during I/O.
//
// # Buffers
//
// An idle stream holds no buffer, and an idle tunnel over TCP holds none of ours: the reader waits for readability
// before it borrows one. An application that talks in many small pieces is read by a clock meanwhile (talker). Received
// DATA is not copied before the application's own read or write takes it.
//
// The framing is ours, because standard transports spill a 9-byte header into a second TLS record and fix their frame
// size early: a DATA frame here, with its header, is exactly one full TLS record.
package hbone
