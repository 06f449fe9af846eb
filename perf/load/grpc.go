package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The service: a unary call and a stream, both of which answer with what they got.
const (
	grpcService = "ambit.perf.Echo"
	grpcAsk     = "/" + grpcService + "/Ask"
	grpcTalk    = "/" + grpcService + "/Talk"
)

var echoService = grpc.ServiceDesc{
	ServiceName: grpcService, HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Ask", Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		var m wrapperspb.BytesValue
		return &m, decode(&m)
	}}},
	Streams: []grpc.StreamDesc{{StreamName: "Talk", ServerStreams: true, ClientStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
		for {
			var m wrapperspb.BytesValue
			err := s.RecvMsg(&m)
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			if err := s.SendMsg(&m); err != nil {
				return err
			}
		}
	}}},
}

func grpcServer() *grpc.Server {
	s := grpc.NewServer()
	s.RegisterService(&echoService, nil)
	return s
}

// calls are gRPC's connections.
type calls struct{ conns []*grpc.ClientConn }

func dialGRPC(r *run) (*calls, error) {
	c := &calls{}
	for range r.Conns {
		// passthrough: the address is what it is, nothing is looked up.
		conn, err := grpc.NewClient("passthrough:///"+r.Server, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
				return r.dial(open(verbGRPC, headerSize))
			}))
		if err != nil {
			c.close()
			return nil, fmt.Errorf("make gRPC client: %w", err)
		}
		c.conns = append(c.conns, conn)
	}
	return c, nil
}

func (c *calls) close() {
	for _, conn := range c.conns {
		_ = conn.Close() // the load is over
	}
}

func (c *calls) of(r *run, i int) *grpc.ClientConn { return c.conns[i/max(r.Calls, 1)] }

func (r *run) grpcUnary(w *worker, i int) error {
	defer r.pin()()
	conn := r.calls.of(r, i)
	in, out := wrapperspb.Bytes(make([]byte, r.Size)), &wrapperspb.BytesValue{}
	for first := true; !r.ended.Load(); first = false {
		began, err := r.turn(w)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(r.ctx, r.Timeout)
		err = conn.Invoke(ctx, grpcAsk, in, out)
		cancel()
		if err != nil {
			return err
		}
		if err := r.answered(out); err != nil {
			return err
		}
		r.done(w, monotonic()-began, !first || r.PerSec > 0)
	}
	return nil
}

func (r *run) grpcStream(w *worker, i int) error {
	defer r.pin()()
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	s, err := r.calls.of(r, i).NewStream(ctx, &echoService.Streams[0], grpcTalk)
	if err != nil {
		return err
	}
	in, out := wrapperspb.Bytes(make([]byte, r.Size)), &wrapperspb.BytesValue{}
	for first := true; !r.ended.Load(); first = false {
		began, err := r.turn(w)
		if err != nil {
			return err
		}
		if err := s.SendMsg(in); err != nil {
			return err
		}
		if err := s.RecvMsg(out); err != nil {
			return err
		}
		if err := r.answered(out); err != nil {
			return err
		}
		r.done(w, monotonic()-began, !first || r.PerSec > 0)
	}
	return nil
}

func (r *run) answered(m *wrapperspb.BytesValue) error {
	if len(m.GetValue()) != r.Size {
		return fmt.Errorf("answered with %d bytes, want %d", len(m.GetValue()), r.Size)
	}
	return nil
}
