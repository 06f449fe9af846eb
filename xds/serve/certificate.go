package serve

import (
	"context"
	"math"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/ambit-mesh/ambit/xds/api/ca"
	authority "github.com/ambit-mesh/ambit/xds/ca"
)

// impersonatedKey is the metadata by which a node proxy names the pod's
// identity that it asks for.
const impersonatedKey = "ImpersonatedIdentity"

// certificateService is the certificate API with its one method handled as a
// stream of one message each way, which is the same on the wire. gRPC reads a
// unary request before any interceptor runs: callers without a token could make
// the server hold maxReceive bytes for each of their calls.
var certificateService = grpc.ServiceDesc{
	ServiceName: ca.IstioCertificateService_ServiceDesc.ServiceName,
	HandlerType: (*ca.IstioCertificateServiceServer)(nil),
	Streams:     []grpc.StreamDesc{{StreamName: "CreateCertificate", Handler: handleCertificate, ServerStreams: true}},
	Metadata:    ca.IstioCertificateService_ServiceDesc.Metadata,
}

func handleCertificate(srv any, ss grpc.ServerStream) error {
	var req ca.IstioCertificateRequest
	if err := ss.RecvMsg(&req); err != nil {
		return err
	}
	resp, err := srv.(ca.IstioCertificateServiceServer).CreateCertificate(ss.Context(), &req)
	if err != nil {
		return err
	}
	return ss.SendMsg(resp)
}

// CreateCertificate signs a certificate for the identity that the caller may
// have; what the request's own names say is ignored.
func (s *Server) CreateCertificate(ctx context.Context, req *ca.IstioCertificateRequest) (*ca.IstioCertificateResponse, error) {
	begin := time.Now()
	chain, id, err := s.createCertificate(ctx, req)
	s.metrics.certificates.WithLabelValues(status.Code(err).String()).Inc()
	s.metrics.signSeconds.Observe(time.Since(begin).Seconds())
	if err != nil {
		return nil, err
	}
	s.cfg.Log.Debug("certificate signed", "caller", callerOf(ctx), "identity", id)
	return &ca.IstioCertificateResponse{CertChain: chain}, nil
}

func (s *Server) createCertificate(ctx context.Context, req *ca.IstioCertificateRequest) ([]string, string, error) {
	caller := callerOf(ctx)
	impersonate, err := impersonated(req)
	if err != nil {
		return nil, "", asStatus(err)
	}
	id, err := s.cfg.Rule.Identity(caller, impersonate)
	if err != nil {
		s.cfg.Log.Warn("certificate refused", "peer", peerAddr(ctx), "error", err)
		return nil, "", asStatus(err)
	}
	chain, err := s.cfg.Signer.Sign([]byte(req.Csr), id, seconds(req.ValidityDuration))
	if err != nil {
		s.cfg.Log.Warn("certificate not signed", "caller", caller, "identity", id, "error", err)
		return nil, "", asStatus(err)
	}
	return chain, id.String(), nil
}

// impersonated reads the metadata. A value of another type is refused rather
// than taken for absent: absent means the caller's own identity.
func impersonated(req *ca.IstioCertificateRequest) (string, error) {
	v, ok := req.GetMetadata().GetFields()[impersonatedKey]
	if !ok {
		return "", nil
	}
	uri := v.GetStringValue()
	if uri == "" {
		return "", &authority.InvalidError{Reason: impersonatedKey + " must be a SPIFFE URI, or absent to ask for the caller's own identity"}
	}
	return uri, nil
}

// seconds converts a requested life; the authority clamps it.
func seconds(n int64) time.Duration {
	if n > math.MaxInt64/int64(time.Second) {
		return math.MaxInt64
	}
	return time.Duration(n) * time.Second
}
