package app

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/test/netlab"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// inChild runs the calling test again, as a process of its own in a network
// namespace of its own where only loopback is, as an ordinary user without
// capabilities. It reports whether this is that process.
func inChild(t *testing.T) bool {
	const mark = "AMBIT_TEST_CHILD"
	if os.Getenv(mark) == t.Name() {
		return true
	}
	netlab.Require(t)
	host := netlab.MustHost(t, "plain-host")
	var out strings.Builder
	start := func(as *syscall.SysProcAttr) (*exec.Cmd, error) {
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), mark+"="+t.Name())
		cmd.Dir, cmd.SysProcAttr = "/", as
		cmd.Stdout, cmd.Stderr = &out, &out
		return cmd, host.NS.Do(cmd.Start)
	}
	const nobody = 65534
	cmd, err := start(&syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody, NoSetGroups: true}})
	if errors.Is(err, syscall.EINVAL) {
		// Tests of an ordinary user run in a user namespace that knows root alone;
		// another one inside it knows nobody alone.
		only := []syscall.SysProcIDMap{{ContainerID: nobody, HostID: 0, Size: 1}}
		cmd, err = start(&syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: only, GidMappings: only})
	}
	if errors.Is(err, syscall.EPERM) {
		t.Skipf("cannot become another user: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v:\n%s", err, out.String())
	}
	return false
}

const oneHost = `
workloads:
- uid: vm/client
  name: client
  namespace: default
  serviceAccount: client
  trustDomain: cluster.local
  workloadIps: [127.0.0.1]
  protocol: HBONE
  authorizationPolicies: [default/not-8081]
  services:
    default/web.default.svc.cluster.local: {80: 8080, 81: 8081, 82: 8082}
policies:
- {name: not-8081, namespace: default, scope: WorkloadSelector, action: Deny, rules: [[[{destinationPorts: [8081]}]]]}
services:
- {name: web, namespace: default, hostname: web.default.svc.cluster.local, vips: [/127.10.0.1], ports: {80: 8080, 81: 8081, 82: 8082}}
- {name: empty, namespace: default, hostname: empty.default.svc.cluster.local, vips: [/127.10.0.2], ports: {80: 8080}}
`

// startDedicated is the whole process but for the certificate authority and the
// way to trust the control plane.
func startDedicated(t *testing.T, xdsTLS func() (*tls.Config, error), flags ...string) *process {
	t.Helper()
	w := &world{T: t, ca: meshca.New(t, "cluster.local")}
	cfg, err := Parse(append([]string{"--proxy-mode=dedicated", "--proxy-workload-info=default/client/client", "--unstable-enable-socks5", "--admin-addr=127.0.0.1:0", "--stats-addr=127.0.0.1:0",
		"--readiness-addr=127.0.0.1:0", "--connection-termination-deadline=1s", "--ipv6-enabled=false", "--auth-token=a.b.c"}, flags...), []string{"ISTIO_META_ISTIO_VERSION=1.2.3"}, io.Discard)
	w.check(err)
	p := &process{t: t, logs: &logBuffer{c: make(chan struct{})}, donec: make(chan error, 1)}
	log, levels := boot.NewLogger(p.logs, "text", "debug")
	w.check(cfg.degrade(log, probe))
	reg := boot.NewRegistry("ztunnel")
	levels.Rename(scopeOf)
	a := assemble(cfg, log, reg, w)
	a.ca, a.xdsTLS = nopCloser{}, xdsTLS
	ctx, cancel := context.WithCancel(context.Background())
	p.stop = cancel
	go func() { p.donec <- a.run(ctx, levels, reg) }()
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("log of the process:\n%s", p.logs.text())
		}
	})
	url := func(port string) string {
		return "http://" + listening.FindStringSubmatch(p.logs.want(t, "listening", `port="`+port+`"`))[1]
	}
	p.ready, p.stats, p.admin = url("readiness")+"/healthz/ready", url("metrics")+"/metrics", url("admin")
	eventually(t, "ready", func() bool { code, _ := get(t, p.ready); return code == 200 })
	return p
}

// A plain host's own proxy: no root, no agent, no control plane, SOCKS as the
// way in, and mTLS between the two ends all the same.
func TestDedicatedProxyOfAnOrdinaryUser(t *testing.T) {
	if !inChild(t) {
		return
	}
	if os.Getuid() == 0 {
		t.Fatal("still root")
	}
	web, err := net.Listen("tcp4", "127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "hello %s", r.Host) })}
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(web) }()
	defer func() { _ = srv.Close(); <-served }()
	p := startDedicated(t, nil, "--xds-address=", "--local-xds", oneHost, "--istio-meta-dns-capture=false")
	for _, want := range []string{"sockets are not marked", "applications see this proxy's address"} {
		p.logs.want(t, "warn", want)
	}

	if curl, err := exec.LookPath("curl"); err == nil {
		for _, name := range []string{"web", "web.default", "web.default.svc", "web.default.svc.cluster.local", "127.10.0.1"} {
			out, err := exec.Command(curl, "-sS", "--max-time", "10", "--socks5-hostname", "127.0.0.1:15080", "http://"+name+"/").CombinedOutput()
			if err != nil || string(out) != "hello "+name {
				t.Errorf("curl %s: %q, %v", name, out, err)
			}
		}
		out, err := exec.Command(curl, "-sS", "--max-time", "10", "--socks5-hostname", "127.0.0.1:15080", "http://127.0.0.5:9/").CombinedOutput()
		if err == nil || !strings.Contains(string(out), "(5)") {
			t.Errorf("curl to a closed port: %q, %v, want reply 5", out, err)
		}
	}
	p.logs.want(t, "connection complete", `dst.hbone_addr=127.0.0.1:8080`, `direction="inbound"`, `src.identity="spiffe://cluster.local/ns/default/sa/client"`)

	for _, tt := range []struct {
		name, request string
		code          byte
	}{
		{"nobody listens behind the tunnel", "\x05\x01\x00\x01\x7f\x0a\x00\x01\x00\x52", 5},
		{"the policy denies", "\x05\x01\x00\x01\x7f\x0a\x00\x01\x00\x51", 2},
		{"no endpoint", "\x05\x01\x00\x01\x7f\x0a\x00\x02\x00\x50", 4},
		{"the proxy's own port", "\x05\x01\x00\x01\x7f\x00\x00\x01\x3a\x99", 2},
		{"nobody listens, no mesh", "\x05\x01\x00\x01\x7f\x00\x00\x05\x00\x09", 5},
		{"no route", "\x05\x01\x00\x01\x0a\x00\x00\x01\x00\x50", 3},
		{"not served", "\x05\x02\x00\x01\x7f\x0a\x00\x01\x00\x50", 7},
		{"open", "\x05\x01\x00\x01\x7f\x0a\x00\x01\x00\x50", 0},
	} {
		c, err := net.Dial("tcp4", "127.0.0.1:15080")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, "\x05\x01\x00"+tt.request); err != nil {
			t.Fatal(err)
		}
		reply := make([]byte, 12)
		if _, err := io.ReadFull(c, reply); err != nil || reply[3] != tt.code {
			t.Errorf("%s: reply %v, %v, want code %d", tt.name, reply, err, tt.code)
		}
		if tt.code != 0 {
			if _, err := c.Read(reply); err != io.EOF {
				t.Errorf("%s: after the reply %v, want the end", tt.name, err)
			}
		}
		_ = c.Close()
	}
	_, body := get(t, p.admin+"/config_dump")
	var dump struct {
		StaticConfig  map[string][]any
		WorkloadState map[string]struct{ State string }
	}
	if err := json.Unmarshal([]byte(body), &dump); err != nil || dump.WorkloadState["dedicated"].State != "Up" ||
		len(dump.StaticConfig["workloads"]) != 1 || len(dump.StaticConfig["policies"]) != 1 || len(dump.StaticConfig["services"]) != 2 {
		t.Errorf("config dump: %v\n%s", err, body)
	}
	p.stop()
	if err := <-p.donec; err != nil {
		t.Error(err)
	}
}

func TestReadinessWaitsFor(t *testing.T) {
	for want, flags := range map[string][]string{
		"state manager, workload proxy manager":                   nil,
		"state manager, workload proxy manager, proxy, dns proxy": {"--proxy-mode=dedicated", "--proxy-workload-info=a/b/c"},
		"state manager, workload proxy manager, proxy":            {"--proxy-mode=dedicated", "--proxy-workload-info=a/b/c", "--istio-meta-dns-capture=false"},
		"state manager, workload proxy manager, dns proxy":        {"--proxy-mode=dedicated", "--proxy-workload-info=a/b/c", "--enable-proxy=false"},
	} {
		c, err := Parse(flags, minimal, io.Discard)
		if got := strings.Join(c.tasks(), ", "); err != nil || got != want {
			t.Errorf("%v: %q, %v, want %q", flags, got, err, want)
		}
	}
}

func TestDedicatedDegradesOnlyWhatWasNotAskedFor(t *testing.T) {
	forbidden := func(sockopt.Options) error { return os.NewSyscallError("setsockopt", unix.EPERM) }
	for _, tt := range []struct {
		name string
		bend func(*Config)
		try  func(sockopt.Options) error
		mark uint64
		src  bool
		err  string
	}{
		{"allowed", func(*Config) {}, func(sockopt.Options) error { return nil }, 0x539, true, ""},
		{"forbidden", func(*Config) {}, forbidden, 0, false, ""},
		{"asked for", func(c *Config) { c.OrigSrc = OrigSrcOn }, forbidden, 0, false, "ENABLE_ORIG_SRC=true"},
		{"not wanted", func(c *Config) { c.OrigSrc, c.EnableOrigSrc, c.PacketMark = OrigSrcOff, false, 0 }, forbidden, 0, false, ""},
	} {
		c := Defaults()
		tt.bend(&c)
		log, _ := boot.NewLogger(io.Discard, "text", "info")
		err := c.degrade(log, tt.try)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: %v", tt.name, err)
			}
			continue
		}
		if err != nil || c.PacketMark != tt.mark || c.EnableOrigSrc != tt.src {
			t.Errorf("%s: %v, mark %d, source %v", tt.name, err, c.PacketMark, c.EnableOrigSrc)
		}
	}
}

func TestTheOneWorkloadIsFoundOnAnyNode(t *testing.T) {
	put := func(m *mesh.Snapshot, uid, node, sa string) *mesh.Snapshot {
		tx := m.Edit()
		tx.PutWorkload(&mesh.Workload{UID: uid, Name: "vm", Node: node, Traits: &mesh.Traits{Namespace: "ns", ServiceAccount: sa, Identity: identity.MustParse("spiffe://td/ns/ns/sa/" + sa)}})
		return tx.Commit()
	}
	o := only{ref: WorkloadRef{"ns", "vm", "sa"}}
	m := mesh.Empty()
	for range 2 { // the second look is one that remembers
		if o.lookup(m) != nil {
			t.Error("found in an empty mesh")
		}
	}
	m = put(m, "a", "", "other")
	if o.lookup(m) != nil {
		t.Error("found under another service account")
	}
	m = put(put(m, "c", "n1", "sa"), "b", "", "sa")
	if w := o.lookup(m); w == nil || w.UID != "b" {
		t.Errorf("found %v", w)
	}
	m = put(m, "b", "", "other")
	if w := o.lookup(m); w == nil || w.UID != "c" {
		t.Errorf("after a change found %v", w)
	}
	tx := m.Edit()
	tx.RemoveWorkload("c")
	if o.lookup(tx.Commit()) != nil {
		t.Error("found after its end")
	}
}
