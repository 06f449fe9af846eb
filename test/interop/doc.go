// Package interop runs our half of the mesh against another project's node proxy.
// It takes that proxy as a finished binary and knows nothing of how it is built:
//
//	make interop ZTUNNEL=/path/to/ztunnel
//
// One lab has four nodes, two with each proxy, all under our ambitd (xDS, CA) and
// our ambit-node (ZDS, redirection), so that every case runs in four directions:
//
//	node-1 ours ──▶ node-4 ours       node-2 theirs ──▶ node-1 ours
//	node-1 ours ──▶ node-2 theirs     node-2 theirs ──▶ node-3 theirs
//
// The tests carry the build tag interop: without a foreign binary there is nothing
// to run, and `make test` must not count that as a gap of the machine. What moves
// bytes in the pods (this file's neighbours, untagged) is the test binary itself,
// started again as `TEST traffic ...`.
//
// A case may note what the other proxy does otherwise by design; the note stands
// in the table instead of a bare "ok".
package interop
