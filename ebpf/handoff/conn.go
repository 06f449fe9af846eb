package handoff

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/xds/api/zds"
)

// conn is the agent's end of one proxy's connection. serve's goroutine sends one
// message and waits for its ack before the next; another one only reads.
type conn struct {
	srv  *Server
	uc   *net.UnixConn
	peer Peer

	reqc  chan *request // unbuffered: whoever asks waits its turn
	ackc  chan *zds.Ack // from readLoop
	readc chan error    // readLoop's end, cap 1
	donec chan struct{} // closed when serve returns
}

// request is one message to a proxy. The loop owns pod.NS.
type request struct {
	msg    *zds.WorkloadRequest
	pod    Pod
	replyc chan error // cap 1: the asker may be gone
}

func addRequest(p Pod) *request {
	return &request{pod: p, replyc: make(chan error, 1), msg: &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Add{
		Add: &zds.AddWorkload{Uid: p.UID, WorkloadInfo: &zds.WorkloadInfo{
			Name: p.Name, Namespace: p.Namespace, ServiceAccount: p.ServiceAccount,
		}},
	}}}
}

func delRequest(uid string) *request {
	return &request{replyc: make(chan error, 1), msg: &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Del{
		Del: &zds.DelWorkload{Uid: uid},
	}}}
}

func keepRequest(uid string) *request {
	return &request{replyc: make(chan error, 1), msg: &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Keep{
		Keep: &zds.KeepWorkload{Uid: uid},
	}}}
}

func snapshotSent() *request {
	return &request{replyc: make(chan error, 1), msg: &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_SnapshotSent{
		SnapshotSent: &zds.SnapshotSent{},
	}}}
}

// do has r sent and returns the proxy's answer.
func (c *conn) do(ctx context.Context, r *request) error {
	select {
	case c.reqc <- r:
	case <-c.donec:
		closePod(r.pod)
		return ErrNoProxy
	case <-ctx.Done():
		closePod(r.pod)
		return context.Cause(ctx)
	}
	select {
	case err := <-r.replyc:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// serve is one connection's whole life.
func (s *Server) serve(ctx context.Context, uc *net.UnixConn) {
	defer uc.Close()
	log := s.cfg.Logger
	caller, err := callerOf(uc)
	if err != nil {
		log.Warn("proxy turned away", "err", err)
		return
	}
	defer caller.close()
	peer := caller.Peer
	log = log.With("peer_pid", peer.PID, "peer_uid", peer.UID)
	c := &conn{
		srv: s, uc: uc, peer: peer,
		reqc: make(chan *request), ackc: make(chan *zds.Ack),
		readc: make(chan error, 1), donec: make(chan struct{}),
	}
	stop := context.AfterFunc(ctx, func() { _ = uc.Close() })
	defer stop()
	if err := c.readHello(s.cfg.AckTimeout); err != nil {
		s.metrics.dropped(err)
		log.Warn("proxy turned away", "err", err)
		return
	}
	if s.cfg.Admit != nil {
		if err := s.cfg.Admit(caller); err != nil {
			s.metrics.dropped(err)
			log.Warn("proxy turned away", "err", err)
			return
		}
	}
	pods, err := s.join(c)
	if err != nil {
		log.Error("proxy turned away", "err", err)
		return
	}
	log.Info("proxy connected", "pods", len(pods))
	go c.readLoop()
	err = c.run(ctx, pods)
	s.leave(c)
	close(c.donec)
	_ = uc.Close() // ends readLoop
	<-c.readc
	if ctx.Err() == nil {
		s.metrics.dropped(err)
		log.Warn("proxy disconnected", "err", err)
	}
}

func (c *conn) readHello(timeout time.Duration) error {
	_ = c.uc.SetReadDeadline(time.Now().Add(timeout)) // fails only when closed; the read says so
	hello := &zds.ZdsHello{}
	if err := c.read(make([]byte, maxMessage), hello); err != nil {
		return fmt.Errorf("read hello: %w", err)
	}
	if hello.GetVersion() != zds.Version_V1 {
		return protocolErrorf("version %d, want 1", hello.GetVersion())
	}
	_ = c.uc.SetReadDeadline(time.Time{}) // as above
	return nil
}

// read takes one packet. Without room for control messages the kernel closes
// descriptors a proxy should not have sent, and says so.
func (c *conn) read(buf []byte, m proto.Message) error {
	n, oobn, flags, _, err := c.uc.ReadMsgUnix(buf, nil)
	if err != nil {
		return err
	}
	if err := checkPacket(n, oobn, flags); err != nil {
		return err
	}
	return decode(buf[:n], m)
}

func (c *conn) readLoop() {
	buf := make([]byte, maxMessage)
	for {
		resp := &zds.WorkloadResponse{}
		err := c.read(buf, resp)
		if err == nil && resp.GetAck() == nil {
			err = protocolErrorf("answer without an ack")
		}
		if err != nil {
			c.readc <- err
			return
		}
		select {
		case c.ackc <- resp.GetAck():
		case <-c.donec:
			c.readc <- net.ErrClosed
			return
		}
	}
}

// run sends the snapshot and then what is asked for, until the connection fails.
func (c *conn) run(ctx context.Context, pods []Pod) error {
	if err := c.snapshot(ctx, pods); err != nil {
		return err
	}
	for {
		select {
		case r := <-c.reqc:
			err := c.exchange(ctx, r)
			closePod(r.pod)
			r.replyc <- err
			if fatal(err) {
				return err
			}
		case <-c.ackc:
			return protocolErrorf("ack of nothing")
		case err := <-c.readc:
			c.readc <- err // serve waits for it too
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (c *conn) snapshot(ctx context.Context, pods []Pod) error {
	defer func() {
		for _, p := range pods {
			closePod(p)
		}
	}()
	for _, p := range pods {
		r := addRequest(p)
		if p.NS == nil {
			r = keepRequest(p.UID)
		}
		err := c.exchange(ctx, r)
		if f := c.srv.cfg.SnapshotResult; f != nil && p.NS != nil {
			f(p.UID, err)
		}
		if fatal(err) {
			return err
		}
	}
	return c.exchange(ctx, snapshotSent())
}

// exchange sends one message and waits for its ack. Any error but a
// *RejectedError means that the connection is of no more use.
func (c *conn) exchange(ctx context.Context, r *request) error {
	timeout := c.srv.cfg.AckTimeout
	_ = c.uc.SetWriteDeadline(time.Now().Add(timeout)) // fails only when closed; the write says so
	started := time.Now()
	if err := writeMessage(c.uc, r.msg, r.pod.NS); err != nil {
		return fmt.Errorf("send to proxy: %w", err)
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case ack := <-c.ackc:
		c.srv.metrics.ack.Observe(time.Since(started).Seconds())
		if ack.GetError() != "" {
			c.srv.metrics.rejections.Inc()
			return &RejectedError{Reason: ack.GetError()}
		}
		return nil
	case err := <-c.readc:
		c.readc <- err // serve waits for it too
		return fmt.Errorf("wait for proxy's ack: %w", err)
	case <-timer.C:
		return fmt.Errorf("wait for proxy's ack: %w after %v", os.ErrDeadlineExceeded, timeout)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func fatal(err error) bool {
	if err == nil {
		return false
	}
	_, rejected := errors.AsType[*RejectedError](err)
	return !rejected
}
