package topo

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/ambit-mesh/ambit/perf/load"
	"github.com/ambit-mesh/ambit/perf/peer"
)

// hopWorkers is what every HTTP hop gets, however it calls it: threads, workers,
// concurrency.
const hopWorkers = 2

// hopPort is the first port of HTTP hops: below those that the kernel gives away.
const hopPort = 9101

// layHTTP puts one HTTP proxy between the client and the server of another node, at
// the server's. Waypoints will be measured in its place.
func (l *Lab) layHTTP(ctx context.Context, mode string, e end) (Path, error) {
	server := fmt.Sprintf("%s:%d", e.farIP, load.Port)
	p := Path{Mode: mode, Placement: Hop1, Namespace: e.namespace, Server: server, About: "client to server, HTTP/1.1"}
	p.Watch = []load.Process{{Name: "server", PID: e.serverPID[Cross]}}
	if mode == None {
		return p, nil
	}
	addr, err := l.nodeAddr(ctx, e.far)
	if err != nil {
		return p, err
	}
	h := peer.Hop{Kind: peer.NetHTTP, Listen: fmt.Sprintf("%s:%d", addr, hopPort+l.hops), To: server, Workers: hopWorkers}
	l.hops++
	p.About = fmt.Sprintf("one HTTP/1.1 hop by httputil.ReverseProxy, %d processors", hopWorkers)
	p.Logs = "no access log"
	p.Version, p.Commands = "as "+filepath.Base(l.Self), []string{filepath.Base(l.Self) + " " + Proxy}
	if other, ok := l.Peers[mode]; ok {
		h.Kind, h.Program = other.Kind, other.Program
		p.About = fmt.Sprintf("one HTTP/1.1 hop by %s, %d workers, connections kept on both sides, no access log", h.Kind, hopWorkers)
		p.Version = strings.TrimPrefix(h.Kind.Version(ctx, h.Program), h.Program+" ")
	}
	b, err := json.Marshal(h)
	if err != nil {
		return p, err
	}
	var s peer.Started
	if _, err := l.beginAs(ctx, &s, nil, e.far, Proxy, string(b)); err != nil {
		return p, err
	}
	p.Server, p.Settings = s.Addr, s.Config
	if len(s.Argv) > 0 {
		p.Commands = []string{strings.Join(s.Argv, " ")}
	}
	for i, pid := range s.PIDs {
		name := mode + "@" + e.far
		if i > 0 {
			name = fmt.Sprintf("%s, worker %d", name, i)
		}
		p.Watch = append(p.Watch, load.Process{Name: name, PID: pid, Proxy: true})
	}
	return p, nil
}
