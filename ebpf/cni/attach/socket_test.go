package attach_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
	"github.com/ambit-mesh/ambit/test/leak"
	"github.com/ambit-mesh/ambit/test/memnet"
)

func TestMain(m *testing.M) { leak.Main(m) }

// agent is a Handler that does what a test says.
type agent struct {
	admit func(ctx context.Context, a attach.Attachment) (bool, string, error)
	calls chan string
	ready error
}

func (h *agent) Admit(ctx context.Context, a attach.Attachment) (bool, string, error) {
	if h.admit == nil {
		return true, "labelled", nil
	}
	return h.admit(ctx, a)
}

func (h *agent) Check(context.Context, attach.Attachment) (bool, string, error) {
	return false, "", errors.New("rules are gone")
}

func (h *agent) Attach(_ context.Context, a attach.Attachment) error {
	h.calls <- "attach " + a.ContainerID
	return nil
}

func (h *agent) Detach(_ context.Context, a attach.Attachment) error {
	h.calls <- "detach " + a.ContainerID
	return nil
}

func (h *agent) Collect(_ context.Context, network string, valid []string) error {
	h.calls <- fmt.Sprint("collect ", network, " ", valid)
	return nil
}

func (h *agent) Ready() error { return h.ready }

// serve runs a server in memory and returns a client of it, and how to end it.
func serve(t *testing.T, h *agent) (attach.Client, func(context.Context) (net.Conn, error), context.CancelFunc) {
	t.Helper()
	h.calls = make(chan string, 10)
	ln := memnet.Listen(netip.MustParseAddrPort("127.0.0.1:1"))
	s := attach.Serve(ln, attach.ServerConfig{Handler: h, Registerer: prometheus.NewRegistry()})
	ctx, cancel := context.WithCancel(context.Background())
	donec := make(chan error, 1)
	go func() { donec <- s.Run(ctx) }()
	end := func() {
		cancel()
		if err := <-donec; err != nil {
			t.Errorf("server ended with %v", err)
		}
		donec <- nil
	}
	t.Cleanup(end)
	dial := func(ctx context.Context) (net.Conn, error) {
		return ln.Dial(ctx, netip.MustParseAddr("127.0.0.2"))
	}
	return attach.Client{Dial: dial}, dial, end
}

func pod() attach.Attachment {
	return attach.Attachment{
		Network: "net", ContainerID: "c1", UID: "u1", Namespace: "shop", Name: "web", NetNS: "/var/run/netns/c1",
		Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
	}
}

func TestAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &agent{ready: &attach.Refusal{Message: "not yet", Details: "wait"}}
		var got attach.Attachment
		h.admit = func(_ context.Context, a attach.Attachment) (bool, string, error) {
			got = a
			return true, "labelled", nil
		}
		c, _, _ := serve(t, h)
		ctx := t.Context()
		a, err := c.Ask(ctx, attach.Request{Command: attach.Add, Attachment: pod()})
		if err != nil || !a.InMesh || a.Why != "labelled" || !reflect.DeepEqual(got, pod()) {
			t.Errorf("add: %+v, %v; the agent heard %+v", a, err, got)
		}
		if _, err := c.Ask(ctx, attach.Request{Command: attach.Del, Attachment: pod()}); err != nil || <-h.calls != "detach c1" {
			t.Errorf("del: %v", err)
		}
		if _, err := c.Ask(ctx, attach.Request{Command: attach.Tell, Attachment: pod()}); err != nil || <-h.calls != "attach c1" {
			t.Errorf("tell: %v", err)
		}
		if _, err := c.Ask(ctx, attach.Request{Command: attach.GC, Attachment: attach.Attachment{Network: "net"}, Valid: []string{"c1"}}); err != nil || <-h.calls != "collect net [c1]" {
			t.Errorf("gc: %v", err)
		}
		for _, tc := range []struct {
			request attach.Request
			want    attach.Refusal
		}{
			{attach.Request{Command: attach.Check, Attachment: pod()}, attach.Refusal{Message: "rules are gone"}},
			{attach.Request{Command: attach.Status}, attach.Refusal{Message: "not yet", Details: "wait"}},
			{attach.Request{Command: "dance"}, attach.Refusal{Message: `the node agent does not know the command "dance"`, Details: "it is older than the CNI plugin: upgrade it", Final: true}},
			{attach.Request{Command: attach.Add}, attach.Refusal{Message: "the container runtime's words about the pod cannot be used",
				Details: "container id is missing\nnamespace is missing\nname is missing\nnetns is missing", Final: true}},
		} {
			_, err := c.Ask(ctx, tc.request)
			if refusal, ok := errors.AsType[*attach.Refusal](err); !ok || *refusal != tc.want {
				t.Errorf("%s: %v, want refusal %+v", tc.request.Command, err, tc.want)
			}
		}
	})
}

// The agent hears how long the plugin can wait, so that it is the agent's sentence
// that comes back.
func TestAgentAnswersBeforeThePluginGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &agent{admit: func(ctx context.Context, a attach.Attachment) (bool, string, error) {
			<-ctx.Done()
			return false, "", &attach.Refusal{Message: "pod " + a.Pod() + " waits for ztunnel"}
		}}
		c, _, _ := serve(t, h)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		began := time.Now()
		_, err := c.Ask(ctx, attach.Request{Command: attach.Add, Attachment: pod()})
		if refusal, ok := errors.AsType[*attach.Refusal](err); !ok || refusal.Message != "pod shop/web waits for ztunnel" {
			t.Errorf("got %v, want the agent's words", err)
		}
		if d := time.Since(began); d != 30*time.Second {
			t.Errorf("waited %v, want 30 s", d)
		}
	})
}

func TestPluginThatHangsUpEndsTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan struct{})
		h := &agent{admit: func(ctx context.Context, _ attach.Attachment) (bool, string, error) {
			<-ctx.Done()
			close(ended)
			return false, "", ctx.Err()
		}}
		_, dial, _ := serve(t, h)
		conn, err := dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write(frame(`{"command":"add","attachment":{"containerID":"c","namespace":"n","name":"p","netns":"/x"}}`))
		synctest.Wait()
		began := time.Now()
		_ = conn.Close()
		<-ended
		if time.Since(began) != 0 {
			t.Error("the agent waited on for a plugin that was gone")
		}
	})
}

// An agent that hung must not do what a runtime has given up, and undone, since.
func TestRequestsThatAreReadTooLateAreNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &agent{admit: func(context.Context, attach.Attachment) (bool, string, error) {
			t.Error("the agent was asked")
			return true, "", nil
		}}
		c, dial, _ := serve(t, h)
		hung := make(chan struct{})
		c.Dial = func(ctx context.Context) (net.Conn, error) { <-hung; return dial(context.Background()) }
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		time.AfterFunc(2*time.Second, func() { close(hung) })
		_, err := c.Ask(ctx, attach.Request{Command: attach.Add, Attachment: pod()})
		if refusal, ok := errors.AsType[*attach.Refusal](err); !ok || refusal.Final || !refusal.Unready || !strings.Contains(refusal.Message, "too late") {
			t.Errorf("got %v, want an agent that was not ready", err)
		}
	})
}

// An agent that ends during a request looks to the plugin like one that is away.
func TestAgentThatEndsIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &agent{admit: func(ctx context.Context, _ attach.Attachment) (bool, string, error) {
			<-ctx.Done()
			return false, "", ctx.Err()
		}}
		c, _, end := serve(t, h)
		errc := make(chan error, 1)
		go func() {
			_, err := c.Ask(t.Context(), attach.Request{Command: attach.Add, Attachment: pod()})
			errc <- err
		}()
		synctest.Wait()
		end()
		if err := <-errc; !errors.Is(err, attach.ErrAway) {
			t.Errorf("got %v, want %v", err, attach.ErrAway)
		}
		if _, err := c.Ask(t.Context(), attach.Request{Command: attach.Status}); !errors.Is(err, attach.ErrAway) {
			t.Errorf("got %v, want %v", err, attach.ErrAway)
		}
	})
}

func frame(body string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
}

func TestNonsenseOnTheSocket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &agent{}
		c, dial, _ := serve(t, h)
		for name, data := range map[string][]byte{
			"nothing": nil, "half a length": {0, 0}, "a length that nobody has": {255, 255, 255, 255},
			"half a message": frame("{}")[:5], "no JSON": frame("GET / HTTP/1.1"), "a list": frame("[]"), "null": frame("null"),
		} {
			conn, err := dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_, _ = conn.Write(data)
			began := time.Now()
			_, _ = io.Copy(io.Discard, conn) // until the server hangs up
			if d := time.Since(began); d > 5*time.Second {
				t.Errorf("%s: served for %v", name, d)
			}
			_ = conn.Close()
		}
		if _, err := c.Ask(t.Context(), attach.Request{Command: attach.Add, Attachment: pod()}); err != nil {
			t.Errorf("after that: %v", err)
		}
	})
}

// The client believes an answer no more than the server a request.
func TestNonsenseFromTheAgent(t *testing.T) {
	for name, answer := range map[string][]byte{"too long": {255, 0, 0, 0}, "no JSON": frame("oops")} {
		client, server := memnet.Pipe()
		c := attach.Client{Dial: func(context.Context) (net.Conn, error) { return client, nil }}
		_, _ = server.Write(answer)
		if _, err := c.Ask(t.Context(), attach.Request{Command: attach.Status}); !errors.Is(err, attach.ErrProtocol) {
			t.Errorf("%s: %v, want %v", name, err, attach.ErrProtocol)
		}
		_ = server.Close()
	}
	c := attach.Client{Path: filepath.Join(t.TempDir(), "none")}
	if _, err := c.Ask(t.Context(), attach.Request{}); !errors.Is(err, attach.ErrAway) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
	r := attach.Request{Valid: []string{strings.Repeat("x", 1<<20)}}
	client, server := memnet.Pipe()
	defer server.Close()
	c = attach.Client{Dial: func(context.Context) (net.Conn, error) { return client, nil }}
	if _, err := c.Ask(t.Context(), r); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a request that is too long: %v", err)
	}
}

func TestSocketIsForItsOwnerAndOfOneAgent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "cni.sock")
	listen := func() (*attach.Server, error) {
		return attach.Listen(attach.ServerConfig{Path: path, Handler: &agent{}})
	}
	first, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", st.Mode(), err)
	}
	if _, err := listen(); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a second agent: %v", err)
	}
	first.Close()
	// What a killed agent leaves.
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	_ = ln.Close()
	next, err := listen()
	if err != nil {
		t.Fatalf("after a killed agent: %v", err)
	}
	next.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("a file in its place: %v", err)
	}
}

func TestUnusableAttachments(t *testing.T) {
	for name, change := range map[string]func(*attach.Attachment){
		"a container id that is a path": func(a *attach.Attachment) { a.ContainerID = "../x" },
		"a hidden container id":         func(a *attach.Attachment) { a.ContainerID = ".x" },
		"a relative namespace":          func(a *attach.Attachment) { a.NetNS = "proc/1/ns/net" },
		"a zero byte":                   func(a *attach.Attachment) { a.Name = "a\x00b" },
		"a long name":                   func(a *attach.Attachment) { a.Name = strings.Repeat("a", 2000) },
		"too many addresses":            func(a *attach.Attachment) { a.Addrs = make([]netip.Addr, 100) },
		"no pod":                        func(a *attach.Attachment) { a.Name = "" },
	} {
		a := pod()
		change(&a)
		if a.Validate() == nil {
			t.Errorf("%s is taken", name)
		}
	}
	if err := pod().Validate(); err != nil {
		t.Error(err)
	}
}

// FuzzSocket sends any bytes to a server: it answers or hangs up, and the next
// plugin is served.
func FuzzSocket(f *testing.F) {
	f.Add(frame(`{"command":"add","attachment":{"containerID":"c","namespace":"n","name":"p","netns":"/x","addrs":["10.0.0.1"]},"deadline":"2000-01-01T00:00:01Z"}`))
	f.Add(frame(`{"command":"gc","valid":["a",1]}`))
	f.Add(frame(`{"command":"status"}`)[:9])
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		synctest.Test(t, func(t *testing.T) {
			h := &agent{admit: func(_ context.Context, a attach.Attachment) (bool, string, error) {
				if err := a.Validate(); err != nil {
					t.Errorf("the agent got an attachment it cannot use: %v", err)
				}
				return true, "", nil
			}}
			_, dial, _ := serve(t, h)
			conn, err := dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_, _ = conn.Write(data)
			answer, _ := io.ReadAll(conn)
			if len(answer) > 0 && (len(answer) < 4 || int(binary.BigEndian.Uint32(answer)) != len(answer)-4 || !bytes.HasPrefix(answer[4:], []byte("{"))) {
				t.Errorf("answer %q is no message", answer)
			}
		})
	})
}
