package hbone

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
)

// fullSocket returns records on a socket that takes no more, how many bytes are on their way, each one more than
// the one before, and the peer that has read none of them.
func fullSocket(t *testing.T) (rc recordConn, sent int, peer *tls.Conn) {
	t.Helper()
	p := testPKI()
	c, s, err := tcpPair(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = c.Close(), s.Close() })
	_ = c.(*net.TCPConn).SetWriteBuffer(64 << 10)
	_ = s.(*net.TCPConn).SetReadBuffer(64 << 10)
	peer = tls.Server(s, p.serverConfig())
	shaken := make(chan error, 1)
	go func() { shaken <- peer.HandshakeContext(t.Context()) }()
	rc, _, err = clientRecords(t.Context(), c, p.clientConfig(), true, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-shaken; err != nil {
		t.Fatal(err)
	}
	for {
		left, err := rc.TryBatch(counting(&sent, 8<<10))
		if err != nil {
			t.Fatal(err)
		}
		if left {
			return rc, sent, peer
		}
	}
}

// counting returns a batch of n bytes that go on counting.
func counting(sent *int, n int) []segment {
	blk := getBlock(n)
	for i := range n {
		blk.data[i] = byte(*sent)
		*sent++
	}
	return []segment{{blk, n}}
}

// What a socket does not take at once is waited for, and nothing is lost, doubled or overtaken.
func TestSmallBatchesWaitForTheSocket(t *testing.T) {
	rc, sent, peer := fullSocket(t)
	const small = 3000
	total := sent + 500*small
	done := make(chan error, 1)
	go func() {
		err := rc.Flush()
		for sent < total && err == nil {
			err = rc.WriteBatch(counting(&sent, small))
		}
		done <- err
	}()
	buf := make([]byte, recordLen)
	for got := 0; got < total; {
		n, err := peer.Read(buf)
		if err != nil {
			t.Fatalf("after %d of %d bytes: %v", got, total, err)
		}
		for _, b := range buf[:n] {
			if b != byte(got) {
				t.Fatalf("byte %d is %d", got, b)
			}
			got++
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Who waits for a socket is told when it is cut, and when its peer leaves.
func TestSmallBatchesEndWithTheSocket(t *testing.T) {
	for name, end := range map[string]func(recordConn, *tls.Conn){
		"cut":        func(rc recordConn, _ *tls.Conn) { _ = rc.Cut() },
		"peer's RST": func(_ recordConn, peer *tls.Conn) { _ = peer.NetConn().Close() }, // it has not read everything
	} {
		t.Run(name, func(t *testing.T) {
			rc, sent, peer := fullSocket(t)
			done := make(chan error, 1)
			go func() {
				err := rc.Flush()
				for err == nil {
					err = rc.WriteBatch(counting(&sent, 1000))
				}
				done <- err
			}()
			end(rc, peer)
			if err := <-done; errors.Is(err, io.EOF) {
				t.Errorf("got %v", err)
			}
		})
	}
}
