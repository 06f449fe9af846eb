package handoff_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/xds/api/zds"
)

func check(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func ownNS(t testing.TB) *netns.NS {
	t.Helper()
	ns, err := netns.Current()
	check(t, err)
	t.Cleanup(func() { ns.Close() })
	return ns
}

func pod(t testing.TB, uid string) handoff.Pod {
	return handoff.Pod{UID: uid, Name: "web-" + uid, Namespace: "shop", ServiceAccount: "web", NS: ownNS(t)}
}

// recorder is a Handler that tells what it was asked as lines.
type recorder struct {
	events chan string

	mu     sync.Mutex
	refuse map[string]string // uid → reason
	pods   map[string]handoff.Pod
}

func newRecorder() *recorder {
	return &recorder{events: make(chan string, 100), refuse: map[string]string{}, pods: map[string]handoff.Pod{}}
}

func (r *recorder) AddPod(_ context.Context, p handoff.Pod) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events <- "add " + p.UID
	if why := r.refuse[p.UID]; why != "" {
		return errors.New(why)
	}
	if old, ok := r.pods[p.UID]; ok {
		old.NS.Close()
	}
	r.pods[p.UID] = p
	return nil
}

func (r *recorder) DelPod(uid string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events <- "del " + uid
	if p, ok := r.pods[uid]; ok {
		p.NS.Close()
		delete(r.pods, uid)
	}
	return nil
}

func (r *recorder) SnapshotDone(known []string) {
	slices.Sort(known)
	r.events <- "snapshot " + strings.Join(known, ",")
}

func (r *recorder) pod(uid string) handoff.Pod {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.pods[uid]
}

func (r *recorder) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.pods {
		p.NS.Close()
	}
}

func (r *recorder) want(t *testing.T, why string, events ...string) {
	t.Helper()
	for _, want := range events {
		select {
		case got := <-r.events:
			if got != want {
				t.Fatalf("%s: the proxy saw %q, want %q", why, got, want)
			}
		case <-time.After(60 * time.Second):
			t.Fatalf("%s: the proxy did not see %q", why, want)
		}
	}
}

// agent is a Server that ends with its test.
type agent struct {
	*handoff.Server
	path    string
	results chan string
	stop    func()
}

func startAgent(t *testing.T, cfg handoff.ServerConfig, pods ...handoff.Pod) *agent {
	t.Helper()
	a := &agent{path: cfg.Path, results: make(chan string, 100)}
	if a.path == "" {
		a.path = filepath.Join(t.TempDir(), "zds.sock")
	}
	cfg.Path = a.path
	cfg.SnapshotResult = func(uid string, err error) { a.results <- fmt.Sprintf("%s %v", uid, err) }
	var err error
	a.Server, err = handoff.Listen(cfg)
	check(t, err)
	for _, p := range pods {
		check(t, a.Track(p))
	}
	ctx, cancel := context.WithCancel(context.Background())
	donec := make(chan error, 1)
	go func() { donec <- a.Run(ctx) }()
	a.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-donec; err != nil {
			t.Errorf("server ended with %v", err)
		}
	})
	t.Cleanup(a.stop)
	return a
}

// startProxy runs a Client and returns its handler and its end.
func startProxy(t *testing.T, path string) (*recorder, *handoff.Client, func()) {
	t.Helper()
	r := newRecorder()
	c := handoff.NewClient(handoff.ClientConfig{Path: path, Handler: r})
	ctx, cancel := context.WithCancel(context.Background())
	donec := make(chan error, 1)
	go func() { donec <- c.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-donec; err != nil {
			t.Errorf("client ended with %v", err)
		}
		r.close()
	})
	t.Cleanup(stop)
	return r, c, stop
}

func TestSnapshotThenChanges(t *testing.T) {
	a := startAgent(t, handoff.ServerConfig{}, pod(t, "one"), handoff.Pod{UID: "kept"})
	r, c, _ := startProxy(t, a.path)
	r.want(t, "snapshot", "add one", "snapshot kept,one")
	p := pod(t, "two")
	check(t, a.Add(t.Context(), p))
	r.want(t, "after the snapshot", "add two")
	if got := r.pod("two"); got.Name != p.Name || got.Namespace != p.Namespace || got.ServiceAccount != p.ServiceAccount || got.NS.Inode() != p.NS.Inode() {
		t.Errorf("the proxy got %+v, want %+v", got, p)
	}
	check(t, a.Del(t.Context(), "one"))
	r.want(t, "removal", "del one")
	if !c.Connected() || !a.Connected() {
		t.Error("both sides should know that they are connected")
	}
	peers := a.Peers()
	if len(peers) != 1 || peers[0].PID != os.Getpid() || int(peers[0].UID) != os.Getuid() {
		t.Fatalf("peers %+v, want this process", peers)
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	check(t, err)
	if path, err := peers[0].Cgroup(); err == nil && !strings.Contains(string(own), "0::"+path+"\n") {
		t.Errorf("peer's cgroup %q, want this process's of %q", path, own)
	}
	if got := <-a.results; got != "one <nil>" {
		t.Errorf("snapshot result %q", got)
	}
}

func TestWithoutProxy(t *testing.T) {
	a := startAgent(t, handoff.ServerConfig{})
	if err := a.Add(t.Context(), pod(t, "one")); !errors.Is(err, handoff.ErrNoProxy) {
		t.Errorf("Add: %v, want ErrNoProxy", err)
	}
	check(t, a.Del(t.Context(), "unknown"))
	r, _, _ := startProxy(t, a.path)
	r.want(t, "what was added before", "add one", "snapshot one")
}

// A proxy that the agent does not want learns of no pod.
func TestProxyIsTurnedAway(t *testing.T) {
	var asked atomic.Int32
	a := startAgent(t, handoff.ServerConfig{Admit: func(p *handoff.Caller) error {
		if p.PID != os.Getpid() {
			t.Errorf("asked about %+v, want this process", p)
		}
		if asked.Add(1) < 3 {
			return errors.New("not yours")
		}
		return nil
	}}, pod(t, "one"))
	r, _, _ := startProxy(t, a.path)
	r.want(t, "the third time", "add one", "snapshot one")
	if n := asked.Load(); n != 3 {
		t.Errorf("asked %d times, want once for each connection", n)
	}
}

func TestRefusalIsReported(t *testing.T) {
	a := startAgent(t, handoff.ServerConfig{})
	r, _, _ := startProxy(t, a.path)
	r.want(t, "empty", "snapshot ")
	long := strings.Repeat("é", 2000)
	for _, why := range []string{"port 15008 is taken", long, "not \xff UTF-8"} {
		r.mu.Lock()
		r.refuse["bad"] = why
		r.mu.Unlock()
		err := a.Add(t.Context(), pod(t, "bad"))
		rejected, ok := errors.AsType[*handoff.RejectedError](err)
		if !ok || rejected.Reason == "" || !strings.HasPrefix(strings.ToValidUTF8(why, "?"), rejected.Reason) {
			t.Errorf("Add: %v, want the refusal %.20q", err, why)
		}
		r.want(t, "refused", "add bad")
	}
	check(t, a.Add(t.Context(), pod(t, "good")))
	r.want(t, "its neighbour", "add good")
}

func TestAddsGoToTheNewestDeletesToAll(t *testing.T) {
	a := startAgent(t, handoff.ServerConfig{}, pod(t, "one"))
	old, _, _ := startProxy(t, a.path)
	old.want(t, "snapshot", "add one", "snapshot one")
	newest, _, stopNewest := startProxy(t, a.path)
	newest.want(t, "snapshot", "add one", "snapshot one")
	check(t, a.Add(t.Context(), pod(t, "two")), a.Del(t.Context(), "one"))
	newest.want(t, "newest", "add two", "del one")
	old.want(t, "oldest", "del one")
	stopNewest()
	for a.Connected() && len(a.Peers()) > 1 {
		time.Sleep(time.Millisecond) // the kernel tells the server in its own time
	}
	check(t, a.Add(t.Context(), pod(t, "three")))
	old.want(t, "newest again", "add three")
}

func TestReconnectAfterAgentRestart(t *testing.T) {
	a := startAgent(t, handoff.ServerConfig{}, pod(t, "one"), pod(t, "two"))
	r, c, _ := startProxy(t, a.path)
	<-r.events
	<-r.events
	r.want(t, "first agent", "snapshot one,two")
	a.stop()
	b := startAgent(t, handoff.ServerConfig{Path: a.path}, pod(t, "two"))
	r.want(t, "second agent", "add two", "snapshot two")
	check(t, b.Del(t.Context(), "two"))
	if !c.Connected() {
		t.Error("client does not know that it is connected")
	}
}

func TestOnlyOneAgent(t *testing.T) {
	a := startAgent(t, handoff.ServerConfig{})
	if _, err := handoff.Listen(handoff.ServerConfig{Path: a.path}); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("second Listen: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	check(t, os.WriteFile(file, []byte("precious"), 0o600))
	if _, err := handoff.Listen(handoff.ServerConfig{Path: file}); err == nil {
		t.Error("Listen replaced a file that is no socket")
	}
	if st, err := os.Stat(a.path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket has mode %v, %v; want 0600", st.Mode(), err)
	}
}

func TestImpossiblePodCostsNobodyElse(t *testing.T) {
	a := startAgent(t, handoff.ServerConfig{})
	r, _, _ := startProxy(t, a.path)
	r.want(t, "empty", "snapshot ")
	for _, p := range []handoff.Pod{
		{UID: "long", Name: strings.Repeat("x", 2000), NS: ownNS(t)},
		{UID: "bytes", Name: "\xff", NS: ownNS(t)},
		{UID: "", NS: ownNS(t)},
		{UID: "no namespace"},
	} {
		if err := a.Add(t.Context(), p); err == nil {
			t.Errorf("pod %q was accepted", p.UID)
		}
	}
	check(t, a.Add(t.Context(), pod(t, "good")))
	r.want(t, "its neighbour", "add good")
}

// rawProxy speaks to an agent packet by packet.
func rawProxy(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	check(t, err)
	check(t, c.SetDeadline(time.Now().Add(60*time.Second)))
	t.Cleanup(func() { c.Close() })
	return c
}

func encode(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	check(t, err)
	return b
}

func hello(t testing.TB) []byte { return encode(t, &zds.ZdsHello{Version: zds.Version_V1}) }

// wantDropped reads until the agent has closed the connection.
func wantDropped(t *testing.T, why string, c *net.UnixConn) {
	t.Helper()
	for {
		n, err := c.Read(make([]byte, 2048))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%s: the connection is still open", why)
		}
		if err != nil || n == 0 {
			return
		}
	}
}

func TestAgentSurvivesBadProxies(t *testing.T) {
	a := startAgent(t, handoff.ServerConfig{AckTimeout: 500 * time.Millisecond}) // the good one answers within that
	ack := encode(t, &zds.WorkloadResponse{Payload: &zds.WorkloadResponse_Ack{Ack: &zds.Ack{}}})
	for _, tc := range []struct {
		name    string
		packets [][]byte
		withFD  bool
	}{
		{"nothing said", nil, false},
		{"garbage", [][]byte{{0xff, 0xff, 0xff}}, false},
		{"too long", [][]byte{make([]byte, 4000)}, false},
		{"other version", [][]byte{encode(t, &zds.ZdsHello{Version: 7})}, false},
		{"a descriptor with the hello", [][]byte{hello(t)}, true},
		{"never acks", [][]byte{hello(t)}, false},
		{"garbage for an ack", [][]byte{hello(t), {0xff}}, false},
		{"empty answer", [][]byte{hello(t), encode(t, &zds.WorkloadResponse{})}, false},
		{"an ack too many", [][]byte{hello(t), ack, ack, ack}, false},
	} {
		c := rawProxy(t, a.path)
		for _, p := range tc.packets {
			var oob []byte
			if tc.withFD {
				oob = unix.UnixRights(0)
			}
			_, _, _ = c.WriteMsgUnix(p, oob, nil) // the agent may have hung up
		}
		wantDropped(t, tc.name, c)
		c.Close()
	}
	r, _, _ := startProxy(t, a.path)
	r.want(t, "a good proxy afterwards", "snapshot ")
	check(t, a.Add(t.Context(), pod(t, "one")))
}

func TestSlowProxyIsDropped(t *testing.T) {
	a := startAgent(t, handoff.ServerConfig{AckTimeout: time.Second}) // the good one answers within that
	good, _, _ := startProxy(t, a.path)
	good.want(t, "empty", "snapshot ")
	slow := rawProxy(t, a.path)
	_, err := slow.Write(hello(t))
	check(t, err)
	_, err = slow.Read(make([]byte, 1024)) // the snapshot's end, acknowledged:
	check(t, err)
	_, err = slow.Write(encode(t, &zds.WorkloadResponse{Payload: &zds.WorkloadResponse_Ack{Ack: &zds.Ack{}}}))
	check(t, err)
	// Now it says nothing any more.
	if err := a.Add(t.Context(), pod(t, "one")); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Add to a silent proxy: %v, want a timeout", err)
	}
	for len(a.Peers()) > 1 {
		time.Sleep(time.Millisecond) // leaving takes a moment after the answer
	}
	check(t, a.Add(t.Context(), pod(t, "one")))
	good.want(t, "the older proxy takes over", "add one")
}

func TestAddEndsWithItsContext(t *testing.T) {
	a := startAgent(t, handoff.ServerConfig{})
	c := rawProxy(t, a.path)
	_, err := c.Write(hello(t))
	check(t, err)
	_, err = c.Read(make([]byte, 1024))
	check(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := a.Add(ctx, pod(t, "one")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Add: %v, want the context's end", err)
	}
}

// rawAgent accepts proxies and speaks to them packet by packet.
type rawAgent struct {
	ln   *net.UnixListener
	path string
}

func newRawAgent(t testing.TB) *rawAgent {
	t.Helper()
	a := &rawAgent{path: filepath.Join(t.TempDir(), "zds.sock")}
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: a.path, Net: "unixpacket"})
	check(t, err)
	a.ln = ln
	t.Cleanup(func() { ln.Close() })
	return a
}

// accept takes the next connection and its hello.
func (a *rawAgent) accept(t testing.TB) *net.UnixConn {
	t.Helper()
	check(t, a.ln.SetDeadline(time.Now().Add(60*time.Second)))
	c, err := a.ln.AcceptUnix()
	check(t, err)
	check(t, c.SetDeadline(time.Now().Add(60*time.Second)))
	t.Cleanup(func() { c.Close() })
	buf := make([]byte, 64)
	n, err := c.Read(buf)
	check(t, err)
	m := &zds.ZdsHello{}
	if err := proto.Unmarshal(buf[:n], m); err != nil || m.GetVersion() != zds.Version_V1 {
		t.Fatalf("hello %v, %v", m, err)
	}
	return c
}

// tell sends a packet with descriptors and returns the ack's error text.
func tell(t testing.TB, c *net.UnixConn, packet []byte, fds ...int) (string, error) {
	t.Helper()
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := c.WriteMsgUnix(packet, oob, nil); err != nil {
		return "", err
	}
	buf := make([]byte, 2048)
	n, err := c.Read(buf)
	if err != nil || n == 0 {
		return "", fmt.Errorf("no answer: %w", err)
	}
	m := &zds.WorkloadResponse{}
	check(t, proto.Unmarshal(buf[:n], m))
	return m.GetAck().GetError(), nil
}

func addPacket(t testing.TB, uid string) []byte {
	return encode(t, &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Add{Add: &zds.AddWorkload{
		Uid: uid, WorkloadInfo: &zds.WorkloadInfo{Name: "n", Namespace: "ns", ServiceAccount: "sa"},
	}}})
}

func openFDs(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	check(t, err)
	return len(entries)
}

func TestProxySurvivesBadAgents(t *testing.T) {
	a := newRawAgent(t)
	ns := ownNS(t).FD()
	plain, err := os.CreateTemp(t.TempDir(), "")
	check(t, err)
	defer plain.Close()
	file := int(plain.Fd())
	del := encode(t, &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Del{Del: &zds.DelWorkload{Uid: "x"}}})
	keep := encode(t, &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Keep{Keep: &zds.KeepWorkload{Uid: "x"}}})
	done := encode(t, &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_SnapshotSent{SnapshotSent: &zds.SnapshotSent{}}})
	for _, tc := range []struct {
		name   string
		before [][]byte // told and acknowledged first
		packet []byte
		fds    []int
	}{
		{"garbage", nil, []byte{0xff, 0xff}, nil},
		{"garbage with a descriptor", nil, []byte{0xff, 0xff}, []int{ns}},
		{"too long, with a descriptor", nil, make([]byte, 1025), []int{ns}},
		{"no payload", nil, encode(t, &zds.WorkloadRequest{}), nil},
		{"empty with a descriptor", nil, nil, []int{ns}},
		{"add without a descriptor", nil, addPacket(t, "x"), nil},
		{"add with two", nil, addPacket(t, "x"), []int{ns, ns}},
		{"add with twenty", nil, addPacket(t, "x"), slices.Repeat([]int{ns}, 20)},
		{"add with a plain file", nil, addPacket(t, "x"), []int{file}},
		{"add without a uid", nil, addPacket(t, ""), []int{ns}},
		{"add without info", nil, encode(t, &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Add{Add: &zds.AddWorkload{Uid: "x"}}}), []int{ns}},
		{"del with a descriptor", nil, del, []int{ns}},
		{"keep after the snapshot", [][]byte{done}, keep, nil},
		{"second snapshot", [][]byte{done}, done, nil},
	} {
		// One proxy each: the pause between attempts grows while nothing works.
		_, _, stop := startProxy(t, a.path)
		c := a.accept(t)
		for _, p := range tc.before {
			if text, err := tell(t, c, p); err != nil || text != "" {
				t.Fatalf("%s: preparation answered %q, %v", tc.name, text, err)
			}
		}
		text, err := tell(t, c, tc.packet, tc.fds...)
		if err == nil && text == "" {
			t.Errorf("%s: accepted", tc.name)
		}
		wantDropped(t, tc.name, c)
		c.Close()
		a.accept(t).Close() // the proxy comes back
		stop()
	}
	startProxy(t, a.path)
	c := a.accept(t)
	// It has let go of everything it was sent once the next packet is answered.
	fds := openFDs(t)
	for range 50 {
		if text, err := tell(t, c, addPacket(t, "one"), ns); err != nil || text != "" {
			t.Fatalf("good add: %q, %v", text, err)
		}
	}
	if got := openFDs(t); got > fds+1 {
		t.Errorf("%d descriptors before 50 replacements of one pod, %d after", fds, got)
	}
}

func TestNothingIsLeftOpen(t *testing.T) {
	ns := ownNS(t)
	before := openFDs(t)
	t.Run("many rounds", func(t *testing.T) {
		a := startAgent(t, handoff.ServerConfig{})
		for i := range 5 {
			r, _, stop := startProxy(t, a.path)
			for strings.HasPrefix(<-r.events, "add") {
			}
			check(t, a.Add(t.Context(), handoff.Pod{UID: fmt.Sprint(i), Name: "n", NS: ns}))
			stop()
			for a.Connected() {
				time.Sleep(time.Millisecond) // the kernel tells the server in its own time
			}
		}
	})
	// Who closes a socket that another goroutine is closing does not wait for it.
	for end := time.Now().Add(30 * time.Second); openFDs(t) > before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d descriptors before, %d after", before, openFDs(t))
		}
	}
}

func FuzzProxyReadsPacket(f *testing.F) {
	f.Add([]byte{}, false)
	f.Add([]byte{0xff}, true)
	f.Add(addPacket(f, "x"), true)
	f.Add(addPacket(f, "x"), false)
	f.Add(encode(f, &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Del{Del: &zds.DelWorkload{Uid: "x"}}}), true)
	ns := ownNS(f)
	a := newRawAgent(f)
	f.Fuzz(func(t *testing.T, packet []byte, withFD bool) {
		if len(packet) > 4096 {
			t.Skip("longer than any reader's interest")
		}
		r := newRecorder()
		client := handoff.NewClient(handoff.ClientConfig{Path: a.path, Handler: r})
		ctx, cancel := context.WithCancel(t.Context())
		donec := make(chan struct{})
		go func() { defer close(donec); _ = client.Run(ctx) }()
		defer func() { cancel(); <-donec; r.close() }()
		c := a.accept(t)
		defer c.Close()
		var fds []int
		if withFD {
			fds = []int{ns.FD()}
		}
		_, _ = tell(t, c, packet, fds...) // any answer but a crash is fine
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.pods) > 0 && !withFD {
			t.Error("a pod without a namespace was added")
		}
	})
}

func FuzzAgentReadsPacket(f *testing.F) {
	f.Add([]byte{8, 1}, []byte{})
	f.Add([]byte{8, 1}, encode(f, &zds.WorkloadResponse{Payload: &zds.WorkloadResponse_Ack{Ack: &zds.Ack{Error: "no"}}}))
	f.Add([]byte{0xff}, []byte{0xff})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		if len(first)+len(second) > 8192 {
			t.Skip("longer than any reader's interest")
		}
		a := startAgent(t, handoff.ServerConfig{AckTimeout: 20 * time.Millisecond}, pod(t, "one"))
		c := rawProxy(t, a.path)
		_, _ = c.Write(first)  // the agent may have hung up
		_, _ = c.Write(second) // as above
		wantDropped(t, "a proxy that stops talking", c)
	})
}
