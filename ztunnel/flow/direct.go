package flow

// Direct is a connection between pods of the same node that goes without the proxy,
// under a lease. The kernel counts it; bytes are known at its end.
const Direct Transport = "direct"
