package serve

import (
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ambit-mesh/ambit/xds/api/trust"
	authority "github.com/ambit-mesh/ambit/xds/ca"
)

// bundler knows what proxies should trust, and when that changes.
type bundler interface {
	Bundle() (authority.Bundle, <-chan struct{})
}

// trustService pushes roots and revocations to proxies that ask for them.
type trustService struct {
	trust.UnimplementedTrustServiceServer
	server  *Server
	watch   bundler
	domains func() []string

	mu       sync.Mutex
	watchers map[string]int // streams by caller; guarded by mu
}

// Watch sends the bundle, and again after each change, until either side ends.
func (t *trustService) Watch(_ *trust.WatchRequest, ss grpc.ServerStreamingServer[trust.Bundle]) error {
	caller := callerOf(ss.Context()).String()
	if !t.enter(caller) {
		return status.Errorf(codes.ResourceExhausted, "%s follows the trust bundle %d times already, the limit per caller", caller, streamsPerCaller)
	}
	defer t.leave(caller)
	for {
		b, changec := t.watch.Bundle()
		domains := t.domains()
		if err := ss.Send(&trust.Bundle{TrustDomain: domains[0], Aliases: domains[1:], Roots: b.Roots, Revoked: string(b.Revoked), Generation: b.Generation, Issuer: b.Issuer}); err != nil {
			return err
		}
		select {
		case <-changec:
		case <-ss.Context().Done():
			return nil
		case <-t.server.stopc:
			return status.Error(codes.Unavailable, "ambitd is shutting down: reconnect")
		}
	}
}

func (t *trustService) enter(caller string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.watchers[caller] >= streamsPerCaller {
		return false
	}
	t.watchers[caller]++
	return true
}

func (t *trustService) leave(caller string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.watchers[caller]--; t.watchers[caller] == 0 {
		delete(t.watchers, caller)
	}
}

// TrustFollowers is how many proxies follow roots and revocations.
func (s *Server) TrustFollowers() int {
	if s.trust == nil {
		return 0
	}
	s.trust.mu.Lock()
	defer s.trust.mu.Unlock()
	return len(s.trust.watchers)
}
