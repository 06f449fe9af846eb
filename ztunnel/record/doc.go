// Package record protects TLS 1.3 records (RFC 8446 section 5) on a connection whose handshake crypto/tls has done.
//
//	crypto/tls handshake ──► Secrets ──Takeover──► Sealer: plaintext ─► records, several in one buffer
//	                                          └──► Opener: records ─► plaintext, in place
//
// crypto/tls moves one record per system call and copies each twice. Here the caller owns all buffers and does all I/O,
// so that many records leave in one write and are opened where they were read.
//
// Takeover is exact when the handshake's connection gave crypto/tls one record per Read, so that it kept nothing back,
// and when the server sent no session tickets: then both directions begin at sequence number 0 under the first
// application traffic secrets. From there on the tls.Conn must be neither read, written nor closed, or a nonce could be
// used twice.
//
// An Opener belongs to one goroutine, a Sealer to one at a time; the two of a connection may run at once. There is
// nothing here for TLS 1.2, for ChaCha20 or for FIPS mode: callers stay with crypto/tls then.
package record
