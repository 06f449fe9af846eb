package app

import (
	"os"
	"runtime/debug"

	"github.com/ambit-mesh/ambit/ztunnel/reclaim"
)

// limitRuntime keeps the runtime within its part of the container's memory.
func limitRuntime(l reclaim.Limit) {
	if l > 0 && os.Getenv("GOMEMLIMIT") == "" { // who sets one means it
		debug.SetMemoryLimit(l.Runtime())
	}
}

// limitMemory keeps the proxy within the container's memory: the runtime's, and as many connections and receive windows as fit.
func (a *app) limitMemory(l reclaim.Limit) {
	limitRuntime(l)
	connections := a.node.ledger.SetMemory(int64(l))
	a.log.Info("memory is limited by the container", "limit", uint64(l), "connections", connections)
}
