package client

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
)

// endedStream is a stream that the server has ended: as with grpc-go, Send says
// io.EOF, one Recv says why, and another one waits for ever.
type endedStream struct {
	deltaStream
	cause error
	told  bool
}

func (s *endedStream) Send(*discovery.DeltaDiscoveryRequest) error { return io.EOF }

func (s *endedStream) Recv() (*response, error) {
	if s.told {
		select {}
	}
	s.told = true
	return nil, s.cause
}

// A request that meets a stream's end must not wait for what the receiving side
// has had already: the client would never connect again.
func TestSendAfterTheStreamEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &endedStream{cause: errors.New("server is shutting down")}
		r := &receiver{stream: s, responses: make(chan *response), donec: make(chan struct{})}
		go r.loop(t.Context())
		synctest.Wait() // the end is known to the receiver
		c := &Client{}
		err := c.send(s, &discovery.DeltaDiscoveryRequest{TypeUrl: "type"})
		if !errors.Is(err, io.EOF) {
			t.Fatalf("send: %v", err)
		}
		if cause := r.cause(); !errors.Is(cause, s.cause) {
			t.Errorf("cause: %v, want %v", cause, s.cause)
		}
	})
}

// What the receiver holds for a session that ends does not keep it.
func TestCauseDoesNotWaitForResponses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		end := errors.New("end")
		r := &receiver{stream: &responding{end: end}, responses: make(chan *response), donec: make(chan struct{})}
		go r.loop(context.WithoutCancel(t.Context()))
		if cause := r.cause(); !errors.Is(cause, end) {
			t.Errorf("cause: %v", cause)
		}
	})
}

// responding has three responses before its end.
type responding struct {
	deltaStream
	n   int
	end error
}

func (s *responding) Recv() (*response, error) {
	if s.n++; s.n > 3 {
		return nil, s.end
	}
	return &response{}, nil
}

// Who cares for memory is told when responses have left much behind.
func TestMuchIsTold(t *testing.T) {
	told := 0
	c := &Client{cfg: Config{Much: func() { told++ }}.withDefaults()}
	b, err := proto.Marshal(&discovery.DeltaDiscoveryResponse{TypeUrl: "not asked for", SystemVersionInfo: strings.Repeat("v", much/4)})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		if err := c.handle(nil, &response{cutUp(b, 0)}); err != nil {
			t.Fatal(err)
		}
		if want := (i + 1) / 4; told != want {
			t.Errorf("told %d times after %d responses, want %d", told, i+1, want)
		}
	}
}
