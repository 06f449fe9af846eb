package ledger

// What of a limited memory is for what is counted here. A container's memory is also the kernel's for it: sockets, and
// what lies in them. So there are no more connections than fit: each that is refused is one, and being killed is all.
const (
	// memoryBase is a proxy's without connections that knows a few thousand workloads.
	memoryBase = 32 << 20
	// perConnection is one that talks: the proxy's and the kernel's, of both sides. A passthrough connection takes a
	// connection, one in a tunnel a stream; each bound is half of what fits.
	perConnection = 16 << 10
	// fewestConnections are those that a memory too small for any has all the same.
	fewestConnections = 256
	// windowShare is one part in how many of what is not memoryBase is for windows, of which at least fewestBytes.
	windowShare = 8
	fewestBytes = 1 << 20
	// unaskedShare is one part in how many of it is for what streams have without asking, each at least fewestUnasked:
	// more than what leaves with a CONNECT.
	unaskedShare  = 4
	fewestUnasked = 4 << 10
)

// SetMemory keeps what may be held at once to what fits a memory of so many bytes, and at most to DefaultLimits; zero is
// no limit. It returns how many connections that makes.
func (l *Ledger) SetMemory(memory int64) (connections int64) {
	limits, unasked := fitting(memory)
	for _, r := range [...]Resource{Connections, Streams, Bytes} {
		l.SetLimit(r, limits[r])
	}
	l.unasked.Store(unasked)
	l.memory.Store(max(0, memory))
	return limits[Connections]
}

func fitting(memory int64) (limits Limits, unasked int64) {
	limits = DefaultLimits()
	if memory <= 0 {
		return limits, 0
	}
	free := memory - memoryBase
	for _, r := range [...]Resource{Connections, Streams} {
		limits[r] = min(limits[r], max(fewestConnections, free/perConnection))
	}
	limits[Bytes] = min(limits[Bytes], max(fewestBytes, free/windowShare))
	return limits, max(fewestUnasked, free/unaskedShare/limits[Streams])
}

// Unasked is how large a stream's receive window may be for which nobody has asked the ledger: many streams, of which
// nobody reads what has come, must fit the node's memory. Zero is as large as is good for the stream.
func (a *Account) Unasked() int64 {
	if a == nil {
		return 0
	}
	return a.l.unasked.Load()
}

// Sockets to local applications. Left alone, the kernel grows both buffers of one to many MiB (tcp_rmem, tcp_wmem in
// tcp(7)) while the application keeps up, and what they hold when it stops comes out of tcp_mem, which the whole node
// shares, and out of the container's memory: a thousand streams that nobody read were enough to make the kernel drop
// other pods' packets.
const (
	// boundBuffer is for a pod's sockets beyond its first tunedSockets: a lone stream is some 8 % slower with it.
	boundBuffer  = 64 << 10
	tunedSockets = 64
	// smallBuffer is for who comes when memory is limited and socketShare, one part in so many, would be used up if nobody
	// read. What a socket holds then is more than its buffers: the kernel takes whole writes, and one that was accepted has
	// room for its segments (sockopt.BoundBuffers).
	smallBuffer = 8 << 10
	socketShare = 2
	tunedHolds  = 4 << 20
	boundHolds  = 192 << 10
)

// Buffers is how large either buffer of the pod's next socket to an application may be; zero is as the kernel sees fit.
func (a *Account) Buffers() int {
	if a == nil {
		return 0
	}
	var own, all int64
	for _, r := range [...]Resource{Connections, Streams} {
		p := &a.l.pools[r]
		p.mu.Lock()
		own += a.used[r].held
		all += p.inUse
		p.mu.Unlock()
	}
	if memory := a.l.memory.Load(); memory > 0 {
		share := max(0, memory-memoryBase) / socketShare
		switch tuned := share / tunedHolds; {
		case all > tuned+share/boundHolds:
			return smallBuffer
		case all > tuned:
			return boundBuffer
		}
	}
	if own > tunedSockets {
		return boundBuffer
	}
	return 0
}
