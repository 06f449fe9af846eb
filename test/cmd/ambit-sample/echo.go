package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// answer is what the echo server says about a request.
type answer struct {
	Host    string              `json:"host"`
	Peer    string              `json:"peer"`
	Local   string              `json:"local,omitempty"`
	Method  string              `json:"method,omitempty"`
	URL     string              `json:"url,omitempty"`
	Proto   string              `json:"proto"`
	Headers map[string][]string `json:"headers,omitempty"`
	Body    string              `json:"body,omitempty"`
}

func hostname() string {
	h, err := os.Hostname()
	if err != nil {
		return err.Error()
	}
	return h
}

// echo serves all kinds of traffic until ctx ends.
func echo(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("echo", flag.ContinueOnError)
	httpAddr := fs.String("http", ":"+cmp.Or(os.Getenv("PORT"), "8080"), "address of HTTP")
	grpcAddr := fs.String("grpc", ":7070", "address of gRPC")
	tcpAddr := fs.String("tcp", ":9000", "address of the TCP echo")
	firstAddr := fs.String("server-first", ":9001", "address of the TCP server that speaks first")
	udpAddr := fs.String("udp", ":9002", "address of the UDP echo")
	if err := fs.Parse(args); err != nil {
		return err
	}
	errc := make(chan error, 5)
	listen := func(addr string, serve func(net.Listener) error) {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			errc <- err
			return
		}
		context.AfterFunc(ctx, func() { _ = ln.Close() })
		go func() { errc <- serve(ln) }()
	}
	web := &http.Server{Handler: httpEcho(), ReadHeaderTimeout: time.Minute}
	// Clear-text HTTP/2 too, for gRPC and h2c clients.
	web.Protocols = new(http.Protocols)
	web.Protocols.SetHTTP1(true)
	web.Protocols.SetUnencryptedHTTP2(true)
	listen(*httpAddr, web.Serve)
	listen(*grpcAddr, grpcEcho().Serve)
	listen(*tcpAddr, func(ln net.Listener) error { return accept(ln, reflectBytes) })
	listen(*firstAddr, func(ln net.Listener) error { return accept(ln, greet) })
	pc, err := net.ListenPacket("udp", *udpAddr)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = pc.Close() })
	go func() { errc <- udpEcho(pc) }()
	fmt.Fprintf(out, "echo: http %s grpc %s tcp %s server-first %s udp %s\n", *httpAddr, *grpcAddr, *tcpAddr, *firstAddr, *udpAddr)
	return <-errc
}

// accept serves each connection until the listener closes.
func accept(ln net.Listener, serve func(net.Conn)) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			serve(c)
		}()
	}
}

// greet speaks first, as mail and database servers do, then echoes lines.
func greet(c net.Conn) {
	fmt.Fprintf(c, "hello %s from %s\n", c.RemoteAddr(), hostname())
	reflectBytes(c)
}

// reflectBytes sends back what comes until the client ends. Without the wrapping
// io.Copy splices, and each connection costs a pipe besides its socket.
func reflectBytes(c net.Conn) {
	_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) // ends with the client
}

func udpEcho(pc net.PacketConn) error {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return err
		}
		_, _ = pc.WriteTo(buf[:n], from) // datagrams may be lost
	}
}

func httpEcho() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("/status/{code}", func(w http.ResponseWriter, r *http.Request) {
		code, err := strconv.Atoi(r.PathValue("code"))
		if err != nil || code < 200 || code > 599 {
			code = http.StatusBadRequest
		}
		w.WriteHeader(code)
	})
	mux.HandleFunc("/delay/{seconds}", func(w http.ResponseWriter, r *http.Request) {
		s, err := strconv.ParseFloat(r.PathValue("seconds"), 64)
		if err != nil || s < 0 || s > 10 {
			s = 10
		}
		select {
		case <-time.After(time.Duration(s * float64(time.Second))):
			describe(w, r)
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("/bytes/{n}", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.PathValue("n"), 10, 64)
		if err != nil || n < 0 || n > 1<<32 {
			http.Error(w, "want 0 to 4294967296", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		_, _ = io.CopyN(w, zeros{}, n) // the client sees a short body
	})
	mux.HandleFunc("/ip", func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr) // as net/http wrote it
		_ = json.NewEncoder(w).Encode(map[string]string{"origin": host})
	})
	mux.HandleFunc("/stream", stream)
	mux.HandleFunc("/", describe)
	return mux
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// stream answers a line every 100 ms until the client leaves: a connection that
// lives long.
func stream(w http.ResponseWriter, r *http.Request) {
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	for n := 1; ; n++ {
		fmt.Fprintf(w, "line %d from %s\n", n, hostname())
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
		select {
		case <-t.C:
		case <-r.Context().Done():
			return
		}
	}
}

func describe(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		return // the client is gone
	}
	a := answer{Host: hostname(), Peer: r.RemoteAddr, Method: r.Method, URL: r.URL.String(), Proto: r.Proto, Headers: r.Header, Body: string(body)}
	if addr, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		a.Local = addr.String()
	}
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(a) // the client sees a short body
}

// grpcEcho serves health, reflection and ambit.sample.Echo/Echo, which takes and
// returns a google.protobuf.StringValue.
func grpcEcho() *grpc.Server {
	s := grpc.NewServer()
	healthpb.RegisterHealthServer(s, health.NewServer())
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: "ambit.sample.Echo", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Echo", Handler: func(_ any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			in := new(wrapperspb.StringValue)
			if err := dec(in); err != nil {
				return nil, err
			}
			a := answer{Host: hostname(), Proto: "gRPC", Body: in.GetValue()}
			if p, ok := peer.FromContext(ctx); ok {
				a.Peer, a.Local = p.Addr.String(), p.LocalAddr.String()
			}
			if md, ok := metadata.FromIncomingContext(ctx); ok {
				a.Headers = md
			}
			b, err := json.Marshal(a)
			if err != nil {
				return nil, status.Error(codes.Internal, err.Error())
			}
			return wrapperspb.String(string(b)), nil
		}}},
	}, struct{}{})
	reflection.Register(s)
	return s
}

// tcpEcho is istio's tcp-echo sample: it answers each line with a prefix.
func tcpEcho(ctx context.Context, args []string, _ io.Writer) error {
	if len(args) < 1 {
		return errors.New("tcp-echo wants PORT[,PORT...] and may have a PREFIX")
	}
	prefix := ""
	if len(args) > 1 {
		prefix = args[1] + " "
	}
	errc := make(chan error, 1)
	for port := range strings.SplitSeq(args[0], ",") {
		ln, err := net.Listen("tcp", ":"+port)
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { _ = ln.Close() })
		go func() {
			errc <- accept(ln, func(c net.Conn) {
				lines := bufio.NewScanner(c)
				for lines.Scan() {
					fmt.Fprintf(c, "%s%s\n", prefix, lines.Text())
				}
			})
		}()
	}
	return <-errc
}
