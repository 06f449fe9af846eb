package hbone

import (
	"context"
	"crypto/tls"
	"io"
	"net/netip"
	"testing"

	"github.com/ambit-mesh/ambit/test/memnet"
)

// Settings are sent by who reads, before it waits: also to a peer that says nothing itself.
func TestSettingsReachASilentPeer(t *testing.T) {
	for _, ambit := range []bool{true, false} {
		srv := NewServer(ServerConfig{AmbitRecords: ambit, Handler: func(context.Context, *Request) {},
			TLS: func(context.Context, netip.AddrPort) (*tls.Config, error) { return testPKI().serverConfig(), nil }})
		c, s, err := tcpPair(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- srv.ServeConn(context.Background(), s) }()
		conn := tls.Client(c, testPKI().clientConfig())
		var head [frameHeaderLen]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			t.Fatal(err)
		}
		if h := parseFrameHeader(&head); h.typ != frameSettings || h.flags&flagAck != 0 {
			t.Errorf("first frame %+v", h)
		}
		if _, err := conn.Write(append([]byte(preface), appendSettings(nil, setting{settingEnablePush, 0})...)); err != nil {
			t.Fatal(err)
		}
		for acked := false; !acked; { // its own settings go on, then the answer to ours
			if _, err := io.CopyN(io.Discard, conn, int64(parseFrameHeader(&head).length)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(conn, head[:]); err != nil {
				t.Fatal(err)
			}
			h := parseFrameHeader(&head)
			acked = h.typ == frameSettings && h.flags&flagAck != 0
		}
		_ = conn.Close()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// Where the client's settings are there already, ours and the answer leave together.
func TestSettingsLeaveWithTheAnswer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c, s := memnet.Pipe()
		defer c.Close()
		rec := &batchRecorder{in: append([]byte(preface), appendSettings(nil, setting{settingEnablePush, 0})...)}
		tn := newTunnel(rec, s, nil, Windows{})
		tn.in.configure(serverMaxHeader)
		tn.hello(100, serverMaxHeader)
		_ = tn.run()
		if len(rec.batches) != 1 {
			t.Fatalf("%d batches, want 1: % x", len(rec.batches), rec.batches)
		}
		if b := rec.batches[0]; frameType(b[3]) != frameSettings || string(b[len(b)-frameHeaderLen:]) != string(appendFrameHeader(nil, 0, frameSettings, flagAck, 0)) {
			t.Errorf("sent % x", b)
		}
	})
}

// batchRecorder has something to read at once, then ends, and notes what is written.
type batchRecorder struct {
	in      []byte
	batches [][]byte
}

func (r *batchRecorder) Buffered() bool { return len(r.in) > 0 }
func (r *batchRecorder) Fill() error    { return io.EOF }
func (r *batchRecorder) CanTry() bool   { return true }
func (r *batchRecorder) Flush() error   { return nil }
func (r *batchRecorder) Close() error   { return nil }
func (r *batchRecorder) Cut() error     { return nil }

func (r *batchRecorder) Next() ([]byte, *block, error) {
	b := getBlock(smallBlock)
	n := copy(b.data, r.in)
	r.in = nil
	return b.data[:n], b, nil
}

func (r *batchRecorder) WriteBatch(parts []segment) error {
	var b []byte
	for _, p := range parts {
		b = append(b, p.blk.data[:p.n]...)
	}
	r.batches = append(r.batches, b)
	return nil
}

func (r *batchRecorder) TryBatch(parts []segment) (bool, error) { return false, r.WriteBatch(parts) }
