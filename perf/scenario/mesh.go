package scenario

import (
	"fmt"
	"time"

	"github.com/ambit-mesh/ambit/perf/load"
	"github.com/ambit-mesh/ambit/perf/topo"
)

// mesh are loads of whole protocols between nodes, and what connections cost.
func mesh() []Scenario {
	var out []Scenario
	add := func(set Set, name, title string, s load.Spec) *Scenario {
		out = append(out, Scenario{Name: string(topo.Cross) + "/" + name, Title: title, Placement: topo.Cross, Load: s, Set: set})
		return &out[len(out)-1]
	}
	for _, conns := range []int{1, 16, 64} {
		set := All
		if conns == 16 {
			set = Core
		}
		add(set, fmt.Sprintf("http-%d", conns), fmt.Sprintf("HTTP/1.1 requests and responses of 1 KiB, %s", connections(conns)),
			load.Spec{Kind: load.HTTP, Conns: conns, Size: kib})
	}
	for _, rate := range []int{500, 2000} {
		set := All
		if rate == 2000 {
			set = Core
		}
		add(set, fmt.Sprintf("http-rate-%d", rate), fmt.Sprintf("%d HTTP/1.1 requests of 1 KiB per second at fixed times, 16 connections", rate),
			load.Spec{Kind: load.HTTP, Conns: 16, Size: kib, PerSec: rate})
	}
	add(All, "http2-16", "HTTP/2 requests and responses of 1 KiB, 16 connections", load.Spec{Kind: load.HTTP, H2: true, Conns: 16, Size: kib})
	add(Core, "grpc-16", "unary gRPC calls of 1 KiB, 4 connections, 4 at a time on each", load.Spec{Kind: load.GRPC, Conns: 4, Calls: 4, Size: kib})
	add(All, "grpc-rate-1000", "1000 unary gRPC calls of 1 KiB per second at fixed times, 4 connections, 4 at a time on each",
		load.Spec{Kind: load.GRPC, Conns: 4, Calls: 4, Size: kib, PerSec: 1000})
	add(Core, "grpc-stream-16", "gRPC messages of 1 KiB and answers on open streams, 4 connections, 4 streams on each",
		load.Spec{Kind: load.GRPCStream, Conns: 4, Calls: 4, Size: kib})
	add(All, "connect-rate-500", "500 connections per second at fixed times, 64 B request and response on each, over tunnels that are open",
		load.Spec{Kind: load.Connect, Conns: 16, Size: 64, PerSec: 500})
	for _, group := range []string{"", load.X25519} {
		name, title := "handshake-16", "mutual TLS 1.3 handshakes with the far proxy, 16 at a time, hybrid post-quantum key exchange"
		if group != "" {
			name, title = name+"-"+group, "mutual TLS 1.3 handshakes with the far proxy, 16 at a time, X25519 alone"
		}
		add(Core, name, title, load.Spec{Kind: load.Handshake, Conns: 16, Size: 64, Group: group}).Needs = Encryption
	}
	add(Core, "tunnel-16", "connections through a cold tunnel each, 64 B request and response, 16 at a time: the far proxy's part",
		load.Spec{Kind: load.Tunnel, Conns: 16, Size: 64}).Needs = Encryption
	s := add(All, "settle-10000", "memory after 10000 connections, 64 at a time, and a minute of nothing",
		load.Spec{Kind: load.Settle, Conns: 64, Total: 10000, Size: 64})
	s.Needs, s.AtLeast, s.Once, s.Fresh = ControlPlane, time.Minute, true, true
	return out
}
