// Package flow is the table of live connections: what each one is, why it was
// allowed, what it moved, and what became of it.
//
//	Begin ─→ Describe ─→ Authorize ─→ (relay) ─→ End
//	  │          │            │                   └ reason → metrics, /refusals, access log
//	  │          │            └ decided under generation g, again if g moved
//	  │          └ labels resolved, "connection opened"
//	  └ registered: from here a sweep sees it
//
// A connection registers before it authorizes and decides again if the
// configuration's generation moved meanwhile; a sweep re-decides, after a
// change, the decided connections that it can concern. Whatever the
// interleaving, each connection is judged by the newest configuration
// (revoke_test.go steps through them).
//
// A Conn belongs to the goroutine that serves it; the sweep and the metrics
// only touch the parts under its mutex and its atomic counters. The package
// owns no socket: it cuts a connection by cancelling its context.
//
// # The access log
//
// One line per connection that ended as its ends wanted. Failures that are the
// same (pod, direction, source, destination, reason, and which policy or
// certificate) share lines: the first is written at once, the others once per
// Config.SumInterval, with count=, the bytes of all of them and the other fields
// of the latest. Resets of live connections are summed too, and are no
// failures: programs end that way all day. The mode of the pod's own workload
// (mesh.Workload.AccessLog) is all, failures or off.
//
// The reference's keys come first, in its order: src.addr, src.workload,
// src.namespace, src.identity, src.cluster, dst.addr, dst.hbone_addr,
// dst.service, dst.workload, dst.namespace, dst.identity, dst.cluster,
// direction, bytes_sent, bytes_recv, duration. Then ours, left out when they
// have nothing to say:
//
//	transport          how the bytes crossed the network
//	retries            other endpoints tried before anything was sent
//	conn_id            the connection, in this process (as in /connections)
//	trace_id           the connection, on every proxy that it passes
//	src.process        who opened an outbound connection: the executable's name, or
//	                   else that of the thread that connected (package origin)
//	src.pid            its process, as the node numbers it
//	src.container      its container, as crictl ps names it
//	src.cgroup         number of its cgroup2 directory (ls -di)
//	dry_run            what a policy in dry run would have done
//	wait.setup         ms from accept until bytes could flow: configuration,
//	                   certificate, tunnel, policy, dial
//	wait.app           ms in which the local application did not read what was
//	                   there for it
//	wait.peer          ms in which the other end's did not: the stream's window
//	                   was used up, or without a tunnel the socket's
//	wait.tunnel        ms in which the tunnel's window was used up: its streams
//	                   together brought more than the other proxy let go of
//	wait.proxy         ms in the tunnel's queue here: other streams were first,
//	                   or the network took no more (net.* then says so)
//	app.rtt_us         us, smoothed round trip of the socket to the local
//	                   application: how fast its side of the kernel answers
//	app.retransmits    segments it sent again
//	net.rtt_us         us, smoothed round trip of the socket to the network
//	net.retransmits    segments it sent again
//	net.busy           ms in which it had data to send or not acknowledged
//	net.rwnd_limited   of those, ms in which the other proxy's socket took no more
//	net.sndbuf_limited of those, ms in which our buffer held no more
//	error, why         what happened; the policy that decided
//	reason             the enumerated Reason
//	reset_by           src or dst: who reset a live connection
//	count              how many ends the line stands for
//
// Times overlap: while an application does not read, windows fill behind it.
// They are the kernel's (TCP_INFO) and the tunnel's own; net.* of a tunnel is
// what its socket met during the connection, all its streams together.
//
// trace_id is made by the proxy of the connection's source and travels as the
// traceparent header of CONNECT (trace.go).
package flow
