package serve

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	authority "github.com/ambit-mesh/ambit/xds/ca"
)

type callerKey struct{}

// callerOf returns who the interceptor found.
func callerOf(ctx context.Context) authority.Caller {
	c, ok := ctx.Value(callerKey{}).(authority.Caller)
	if !ok {
		panic("BUG: call without the authentication interceptor")
	}
	return c
}

// authenticate reviews the bearer token. There is no other way in.
func (s *Server) authenticate(ctx context.Context) (context.Context, error) {
	c, err := s.cfg.Reviewer.Review(ctx, bearer(ctx))
	if err != nil {
		s.metrics.authFailures.Inc()
		s.cfg.Log.Warn("caller refused", "peer", peerAddr(ctx), "error", err)
		return nil, asStatus(err)
	}
	return context.WithValue(ctx, callerKey{}, c), nil
}

// bearer returns the token of `authorization: Bearer <token>`, or "".
func bearer(ctx context.Context) string {
	md, _ := metadata.FromIncomingContext(ctx)
	for _, v := range md.Get("authorization") {
		if scheme, token, ok := strings.Cut(v, " "); ok && strings.EqualFold(scheme, "bearer") {
			return strings.TrimSpace(token)
		}
	}
	return ""
}

func (s *Server) authStream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	ctx, err := s.authenticate(ss.Context())
	if err != nil {
		return err
	}
	return next(srv, &authenticated{ServerStream: ss, ctx: ctx})
}

// authenticated is a stream whose context carries its caller.
type authenticated struct {
	grpc.ServerStream
	ctx context.Context // gRPC's API has it so
}

func (a *authenticated) Context() context.Context { return a.ctx }

// asStatus gives an error of the authority its gRPC code. The text of internal
// errors stays in the log.
func asStatus(err error) error {
	if e, ok := errors.AsType[*authority.UnauthenticatedError](err); ok {
		return status.Error(codes.Unauthenticated, e.Error())
	}
	if e, ok := errors.AsType[*authority.DeniedError](err); ok {
		return status.Error(codes.PermissionDenied, e.Error())
	}
	if e, ok := errors.AsType[*authority.InvalidError](err); ok {
		return status.Error(codes.InvalidArgument, e.Error())
	}
	return status.Error(codes.Internal, "internal error, see the log of ambitd")
}
