package relay

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"syscall"
	"testing"
)

// What a has said before it was joined comes first, and waits for b as the rest of the upload does: the other direction
// runs meanwhile.
func TestStartAfter(t *testing.T) {
	for _, tt := range ways {
		t.Run(tt.name, func(t *testing.T) {
			client, a := tt.a(t)
			server, b := tt.b(t)
			first := bytes.Repeat([]byte("first"), 2<<20) // more than sockets hold
			var st Stats
			donec := make(chan error, 1)
			go StartAfter(t.Context(), bytes.NewReader(first), a, b, &st, func(err error) { donec <- err })
			if _, err := client.Write([]byte("then")); err != nil {
				t.Fatal(err)
			}
			_ = client.CloseWrite()
			if _, err := server.Write([]byte("413")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(client, make([]byte, 3)); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(server)
			if want := append(first, "then"...); !bytes.Equal(got, want) || err != nil {
				t.Errorf("%d bytes came, %v; want %d", len(got), err, len(want))
			}
			_ = server.Close()
			if err := <-donec; err != nil {
				t.Error(err)
			}
			if n := st.Sent.Load(); n != uint64(len(got)) {
				t.Errorf("counted %d of %d", n, len(got))
			}
			_ = client.Close()
		})
	}
}

// taken is what a has said, and whether it was asked for.
type taken struct {
	io.WriterTo
	n int
}

func (f *taken) WriteTo(w io.Writer) (int64, error) {
	f.n++
	return f.WriterTo.WriteTo(w)
}

// It is taken once, also where it can go nowhere any more.
func TestStartAfterTakesItOnce(t *testing.T) {
	client, a := memPair(t)
	server, b := memPair(t)
	_ = server.(interface{ Reset() error }).Reset()
	first := &taken{WriterTo: strings.NewReader("first")}
	donec := make(chan error, 1)
	StartAfter(t.Context(), first, a, b, nil, func(err error) { donec <- err })
	if err := <-donec; !errors.Is(err, syscall.ECONNRESET) || first.n != 1 {
		t.Errorf("%v, taken %d times", err, first.n)
	}
	_ = client.Close()
}
