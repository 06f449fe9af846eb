// Package dns answers the DNS queries of a pod: names of the mesh itself, all
// others through the server that the pod asked.
//
//	app ─ port 53 ─▶ redirector ─▶ 15053: Server ─▶ Resolver: a name of the mesh? ─▶ answer
//	                                                └─▶ no: forward to the original destination, bytes unchanged
//
// The original destination of a TCP connection is SO_ORIGINAL_DST. A datagram was
// sent to where the pod's redirector led it: rules to loopback, and the original
// destination is read from the pod's connection tracking (Conntrack); programs to
// an address that stands for the server, and the kernel puts the server in its
// place when the query goes on to that address. Each answer leaves from where its
// query arrived. Upstream
// sockets are the pod's, with the proxy's mark, so that node-local caches,
// dnsPolicy None and NetworkPolicy keep their meaning.
//
// Resolver is pure: it does no I/O and reads no clock. A Server is one pod's:
// each UDP socket and each TCP connection has one goroutine, and each UDP query
// that goes upstream has one of its own, counted in the pod's ledger account.
// Every Serve call returns when its context ends and has waited for them.
//
// The package is no cache and no recursive resolver: whom the pod asks decides
// about both.
package dns
