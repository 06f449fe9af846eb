package store

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/test/fakexds"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/discovery"
	"github.com/ambit-mesh/ambit/xds/client"
)

// serverEnv makes this benchmark the control plane of another process.
const serverEnv = "AMBIT_RESEND_SERVER"

// BenchmarkResendStream is BenchmarkResend from the wire on: a control plane in another process sends 70,000 workloads
// again over TLS and gRPC. How late decisions are counts from the first byte of it until it is acknowledged.
func BenchmarkResendStream(b *testing.B) {
	const n = 70_000
	if os.Getenv(serverEnv) != "" {
		serveResends(b, n)
		return
	}
	for _, procs := range []int{1, 2} {
		b.Run(fmt.Sprintf("procs=%d", procs), func(b *testing.B) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
			addr, again := startResends(b)
			s := New(Config{})
			defer s.Close()
			p := &applied{Store: s, donec: make(chan struct{}, 16)}
			c, err := client.New(client.Config{Target: addr, Types: []string{api.AddressType, api.AuthorizationType}, Handler: p,
				TLS:  func() (*tls.Config, error) { return &tls.Config{InsecureSkipVerify: true}, nil },
				Dial: p.dial})
			if err != nil {
				b.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan error)
			go func() { ended <- c.Run(ctx) }()
			defer func() { cancel(); <-ended }()
			p.wait(2) // the empty beginning
			again()
			if p.wait(2); s.View().Mesh.Workloads() != n {
				b.Fatalf("%d workloads", s.View().Mesh.Workloads())
			}
			runtime.GC()
			quiet := late(s, n, func() { time.Sleep(500 * time.Millisecond) })
			var busy []time.Duration
			var took time.Duration
			b.ReportAllocs()
			for b.Loop() {
				var from, to time.Time
				all := late(s, n, func() {
					p.first.Store(0)
					again()
					p.wait(1)
					from, to = time.Unix(0, p.first.Load()), time.Now()
				})
				took += to.Sub(from)
				// The samples are about evenly spaced: those at the end are of the time that counts.
				busy = append(busy, all[len(all)-min(len(all), int(to.Sub(from)/(300*time.Microsecond))):]...)
			}
			b.ReportMetric(float64(took.Milliseconds())/float64(b.N), "ms-from-first-byte")
			b.ReportMetric(tail(quiet), "quiet-p99.9-us")
			b.ReportMetric(tail(busy), "p99.9-us")
		})
	}
}

// applied tells when a response was applied, and when its first byte came.
type applied struct {
	*Store
	donec chan struct{}
	first atomic.Int64
}

func (a *applied) Apply(d client.Delta) []client.Reject {
	defer func() { a.donec <- struct{}{} }()
	return a.Store.Apply(d)
}

func (a *applied) wait(responses int) {
	for range responses {
		<-a.donec
	}
}

func (a *applied) dial(ctx context.Context, addr string) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	return &timed{c, a}, err
}

type timed struct {
	net.Conn
	a *applied
}

func (t *timed) Read(b []byte) (int, error) {
	n, err := t.Conn.Read(b)
	t.a.first.CompareAndSwap(0, time.Now().UnixNano())
	return n, err
}

// startResends starts the control plane; again has it send all workloads, and the policies before them the first time.
func startResends(b *testing.B) (addr string, again func()) {
	cmd := exec.Command(os.Args[0], "-test.run", "^$", "-test.bench", "^BenchmarkResendStream$", "-test.benchtime", "1x")
	cmd.Env = append(os.Environ(), serverEnv+"=1", "GOMAXPROCS=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StderrPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = in.Close(); _ = cmd.Wait() })
	if _, err := fmt.Fscanln(out, &addr); err != nil {
		b.Fatal(err)
	}
	go io.Copy(io.Discard, out)
	return addr, func() {
		if _, err := io.WriteString(in, "again\n"); err != nil {
			b.Fatal(err)
		}
	}
}

func serveResends(b *testing.B, n int) {
	s := fakexds.New(b)
	addresses, policies := wholeMesh(b, n)
	var said []*discovery.DeltaDiscoveryResponse
	for _, d := range []client.Delta{policies, addresses} {
		resp := &discovery.DeltaDiscoveryResponse{TypeUrl: d.Type, Nonce: "n"}
		for i, r := range d.Added {
			resp.Resources = append(resp.Resources, &discovery.Resource{Name: r.Name, Version: fmt.Sprintf("%016x", i),
				Resource: &anypb.Any{TypeUrl: r.TypeURL, Value: r.Value}})
		}
		said = append(said, resp)
	}
	fmt.Fprintln(os.Stderr, s.Addr())
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		for _, r := range said {
			if err := s.Say(context.Background(), r); err != nil {
				b.Fatal(err)
			}
		}
		said = said[len(said)-1:]
	}
}
