package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// tunnelEnd is a side that tells when it is lost.
type tunnelEnd struct {
	*memnet.Conn
	watchc chan interface{ Lost(error) }
}

func (e *tunnelEnd) Watch(w interface{ Lost(error) }) { e.watchc <- w }

var errLost = errors.New("tunnel lost")

// halfClosed is a pair of which the tunnel's peer has said data and then all. The application's socket is small, so that
// it takes no more unless the application reads.
func halfClosed(t *testing.T, back bool, data []byte) (app *net.TCPConn, down sockopt.Socket, lost interface{ Lost(error) }, donec chan error) {
	client, accepted := tcpPair(t)
	app, down = client.(*net.TCPConn), accepted.(sockopt.Socket)
	_ = app.SetReadBuffer(2 << 10)
	_ = accepted.(*net.TCPConn).SetWriteBuffer(1 << 20)
	near, far := memnet.Pipe()
	tunnel := &tunnelEnd{near, make(chan interface{ Lost(error) }, 2)}
	var a, b Conn = accepted, tunnel
	if back {
		a, b = b, a
	}
	donec = make(chan error, 2)
	go Start(context.Background(), a, b, nil, func(err error) { donec <- err })
	if _, err := far.Write(data); err != nil {
		t.Fatal(err)
	}
	_ = far.CloseWrite()
	t.Cleanup(func() { _, _ = far.Close(), app.Close() })
	return app, down, <-tunnel.watchc, donec
}

// Who has read all there is hears of it when the side that it could still send to is lost: parked or not, whichever side
// it is.
func TestLostSideOfAHalfClosedPair(t *testing.T) {
	for _, back := range []bool{false, true} {
		for _, park := range []bool{false, true} {
			app, _, lost, donec := halfClosed(t, back, []byte("x"))
			if park {
				allParked(t, 1)
			}
			side := map[bool]string{false: "b", true: "a"}[back]
			lost.Lost(errLost)
			err := <-donec
			if re, ok := errors.AsType[*Error](err); !ok || re.Side != side || re.Op != "write" || !errors.Is(err, errLost) {
				t.Errorf("%s, parked %v: ended with %v", side, park, err)
			}
			lost.Lost(errLost) // comes too late to matter
			if got, err := io.ReadAll(app); string(got) != "x" || err != nil {
				t.Errorf("%s, parked %v: read %q, %v", side, park, got, err)
			}
			if _, err := app.Write([]byte("y")); err == nil {
				t.Errorf("%s, parked %v: the application was not reset", side, park)
			}
			if len(donec) > 0 {
				t.Error("the end was told twice")
			}
		}
	}
}

// What it was sent comes first, however long it takes to read it.
func TestLostSideHasBeenRead(t *testing.T) {
	data := bytes.Repeat([]byte("answer"), 10<<10)
	app, down, lost, donec := halfClosed(t, false, data)
	lost.Lost(errLost)
	if !sockopt.Unacked(down) {
		t.Fatal("the application's socket has taken all of it")
	}
	if got, err := io.ReadAll(app); !bytes.Equal(got, data) || err != nil {
		t.Errorf("read %d bytes of %d, %v", len(got), len(data), err)
	}
	if err := <-donec; !errors.Is(err, errLost) {
		t.Errorf("ended with %v", err)
	}
}

// A pair that ends meanwhile has its own end.
func TestLostSideOfAPairThatEnds(t *testing.T) {
	app, _, lost, donec := halfClosed(t, false, []byte("x"))
	_ = app.CloseWrite()
	if err := <-donec; err != nil {
		t.Error(err)
	}
	lost.Lost(errLost)
	if got, err := io.ReadAll(app); string(got) != "x" || err != nil || len(donec) > 0 {
		t.Errorf("read %q, %v", got, err)
	}
}
