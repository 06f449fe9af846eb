//go:build interop

package interop

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
)

// bulk is how much the big transfer moves each way.
func bulk() int64 {
	if n, err := strconv.ParseInt(os.Getenv("AMBIT_INTEROP_BULK"), 10, 64); err == nil {
		return n
	}
	return 1 << 30
}

func TestTraffic(t *testing.T) {
	l := up(t)
	world(t, l)
	plain := func(args ...string) func(*testing.T, route) string {
		return func(t *testing.T, r route) string {
			return l.call(t, r.client(), append(args, r.server())...)
		}
	}
	each(t, "service address, IPv4 and IPv6", func(t *testing.T, r route) string {
		for _, ip := range l.vips(t, r.server()) {
			l.call(t, r.client(), "echo", ip)
		}
		return ""
	})
	each(t, "pod address, IPv4 and IPv6", func(t *testing.T, r route) string {
		ips := l.addresses(t, r.server())
		for f := range ips {
			mark := l.logged("ztunnel@" + r.to)
			l.call(t, r.client(), "echo", ips[f])
			if len(l.lines(mark, "ztunnel@"+r.to, "connection complete", "sa/client", `direction="inbound"`, `src.identity=`)) == 0 {
				t.Errorf("IPv%d: no inbound line with the client's identity", f)
			}
		}
		if len(ips) < 2 {
			return "IPv4 only"
		}
		return ""
	})
	each(t, "the server sees the client's own address", func(t *testing.T, r route) string {
		for f, ip := range l.addresses(t, r.server()) {
			want := r.server() + " " + l.address(t, r.client(), f)
			if got := l.call(t, r.client(), "who", ip); !strings.Contains(got, want) {
				t.Errorf("the server saw %s, want %s", got, want)
			}
		}
		return ""
	})
	each(t, "port mapped by the service", func(t *testing.T, r route) string {
		at := net.JoinHostPort(l.vips(t, r.server())[4], "80")
		if got := l.call(t, r.client(), "probe", at); !strings.Contains(got, `"ok"`) {
			t.Error(got)
		}
		return ""
	})
	each(t, "headless, pod by name", func(t *testing.T, r route) string {
		return l.call(t, r.client(), "echo", r.server()+".all")
	})
	each(t, "half-close by the client", plain("sink", "-n", "3000000"))
	each(t, "half-close by the server", plain("bye", "-n", "500000"))
	each(t, "server speaks first", plain("greet"))
	each(t, "RST by the server, seen as", plain("abort"))
	each(t, "RST by the client, seen as", plain("reset"))
	each(t, "no listener, seen as", plain("nobody"))
	each(t, "300 streams at once", plain("many", "-n", "300"))
	each(t, "1000 connections in a row", plain("echo", "-n", "1000"))
	each(t, fmt.Sprintf("%d MiB both ways at once, hashed", bulk()>>20), plain("duplex", "-n", fmt.Sprint(bulk())))
	each(t, "same node", func(t *testing.T, r route) string {
		return l.call(t, r.client(), "duplex", "-n", "20000000", "server-"+r.from)
	}, "ours→ours", "theirs→theirs")
	each(t, "pod outside the mesh calls in", func(t *testing.T, r route) string {
		l.call(t, "outside/outsider-"+r.from, "duplex", "-n", "1000000", r.server()+".default")
		return ""
	})
	each(t, "no identity without a certificate of the mesh", func(t *testing.T, r route) string {
		at := net.JoinHostPort(l.address(t, r.server(), 4), "15008")
		// The alert comes after the handshake as the client sees it: wait for it.
		res := l.do("", "exec", "outside/outsider-"+r.from, "--", "sh", "-c", "sleep 2 | timeout 10 openssl s_client -alpn h2 -tls1_3 -connect "+at+" 2>&1; true")
		if !strings.Contains(res.out, "certificate required") {
			t.Errorf("openssl says %s", res.out)
		}
		if strings.Contains(res.out, "TLSv1.2") {
			t.Errorf("TLS 1.2 was agreed on: %s", res.out)
		}
		return ""
	})
	spread(t, l)
}

// spread is about services with several endpoints.
func spread(t *testing.T, l *lab) {
	const who = 200
	calls := func(t *testing.T, r route, host string) map[string]int {
		t.Helper()
		var seen map[string]int
		out := l.call(t, r.client(), "who", "-n", strconv.Itoa(who), host)
		if err := json.Unmarshal([]byte(out), &seen); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		pods := map[string]int{}
		for k, n := range seen {
			pod, _, _ := strings.Cut(k, " ")
			pods[pod] += n
		}
		return pods
	}
	extra := []string{"ours→ours", "theirs→theirs"} // the choice is the client's proxy alone
	var b strings.Builder
	b.WriteString(serviceOf("every", ""))
	b.WriteString(serviceOf("every-ready-or-not", "publishNotReadyAddresses: true"))
	b.WriteString(serviceOf("same-node", "trafficDistribution: PreferSameNode"))
	b.WriteString(serviceOf("same-zone", "trafficDistribution: PreferClose"))
	b.WriteString(serviceOf("local", "internalTrafficPolicy: Local"))
	l.apply(t, b.String())
	each(t, "balanced over endpoints of both proxies", func(t *testing.T, r route) string {
		var pods map[string]int
		until(t, patience, "all four answer", func() (bool, string) {
			pods = calls(t, r, "every")
			return len(pods) == 4, fmt.Sprint(pods)
		})
		for pod, n := range pods {
			if n < who/4/3 {
				t.Errorf("%s got %d of %d calls", pod, n, who)
			}
		}
		return ""
	}, extra...)
	near := func(host string) func(*testing.T, route) string {
		return func(t *testing.T, r route) string {
			until(t, patience, "only the endpoint nearby answers", func() (bool, string) {
				pods := calls(t, r, host)
				return len(pods) == 1 && pods["server-"+r.from] == who, fmt.Sprint(pods)
			})
			return ""
		}
	}
	each(t, "trafficDistribution PreferSameNode", near("same-node"), extra...)
	each(t, "trafficDistribution PreferClose", near("same-zone"), extra...)
	each(t, "internalTrafficPolicy Local", near("local"), extra...)
	each(t, "unready endpoint gets nothing, and publishNotReady", func(t *testing.T, r route) string {
		l.call(t, r.client(), "switch", "-n", "0", r.server())
		defer func() {
			l.call(t, r.client(), "switch", "-n", "1", l.address(t, r.server(), 4))
			l.must(t, "wait", "--timeout", "30s")
		}()
		until(t, patience, "three answer", func() (bool, string) {
			pods := calls(t, r, "every")
			return len(pods) == 3 && pods[r.server()] == 0, fmt.Sprint(pods)
		})
		if pods := calls(t, r, "every-ready-or-not"); len(pods) != 4 {
			t.Errorf("with publishNotReadyAddresses: %v", pods)
		}
		return ""
	}, extra...)
	each(t, "and takes part again", func(t *testing.T, r route) string {
		until(t, patience, "all four answer", func() (bool, string) {
			pods := calls(t, r, "every")
			return len(pods) == 4, fmt.Sprint(pods)
		})
		return ""
	}, extra...)
	l.remove(b.String())
}

func serviceOf(name, spec string) string {
	if spec != "" {
		spec = "  " + spec + "\n"
	}
	return "---\napiVersion: v1\nkind: Service\nmetadata: {name: " + name + "}\nspec:\n  selector: {app: server}\n" + spec + "  ports:\n" + servicePorts
}
