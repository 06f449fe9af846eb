package serve

import (
	"context"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ambit-mesh/ambit/xds/api/trust"
)

func (s *testServer) watch(ctx context.Context) grpc.ServerStreamingClient[trust.Bundle] {
	s.t.Helper()
	conn := s.dial()
	w, err := trust.NewTrustServiceClient(conn).Watch(ctx, &trust.WatchRequest{})
	if err != nil {
		s.t.Fatal(err)
	}
	return w
}

func TestTrustIsPushedToCallersWithAToken(t *testing.T) {
	s := newTestServer(t)
	if _, err := s.watch(s.ctx).Recv(); status.Code(err) != codes.Unauthenticated {
		t.Errorf("without a token: %v", err)
	}
	w := s.watch(s.as(s.token(callerA, "", time.Hour)))
	for range 2 {
		b, err := w.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if b.TrustDomain != "cluster.local" || !slices.Equal(b.Aliases, []string{"old.example"}) || b.Roots != s.ca.Roots() || b.Generation == 0 || len(b.Issuer) == 0 {
			t.Errorf("got %v", b)
		}
		s.ca.Announce()
	}
}

func TestTrustStreamsPerCallerAreBounded(t *testing.T) {
	s := newTestServer(t)
	ctx, cancel := context.WithCancel(s.as(s.token(callerA, "", time.Hour)))
	for range streamsPerCaller {
		if _, err := s.watch(ctx).Recv(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.watch(ctx).Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one more: %v", err)
	}
	if _, err := s.watch(s.as(s.token(callerB, "", time.Hour))).Recv(); err != nil {
		t.Errorf("another caller: %v", err)
	}
	if n := s.server.TrustFollowers(); n != 2 {
		t.Errorf("%d followers", n)
	}
	cancel()
	s.until("the streams have ended", func() bool { return s.server.TrustFollowers() == 1 })
}

func TestShutdownEndsTrustStreams(t *testing.T) {
	s := newTestServer(t)
	w := s.watch(s.as(s.token(callerA, "", time.Hour)))
	if _, err := w.Recv(); err != nil {
		t.Fatal(err)
	}
	s.server.Shutdown(s.ctx)
	if _, err := w.Recv(); status.Code(err) != codes.Unavailable || s.ctx.Err() != nil {
		t.Errorf("the stream ended with %v, waited for: %v", err, s.ctx.Err())
	}
}
