package control

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
)

// The lab's cancellation may close the caller's connection before the answer
// is out; `down` succeeded all the same, and the name is free when it returns.
func TestDownReturnsWhenTheNameIsFree(t *testing.T) {
	name := fmt.Sprintf("control-test-%d", os.Getpid())
	for range 20 {
		ln, err := Listen(name)
		if err != nil {
			t.Fatalf("the name is taken after Down: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		donec := make(chan error, 1)
		go func() {
			donec <- Serve(ctx, ln, func(context.Context, Request, []*os.File, <-chan syscall.Signal, *Writer) int {
				cancel()
				return 0
			})
		}()
		code, err := Down(t.Context(), name, io.Discard, io.Discard)
		if code != 0 || err != nil {
			t.Fatalf("down: %d, %v", code, err)
		}
		if err := <-donec; err != nil {
			t.Fatal(err)
		}
	}
	if code, err := Down(t.Context(), name, io.Discard, io.Discard); code == 0 || err == nil {
		t.Errorf("down of nothing: %d, %v", code, err)
	}
}

// A caller that says nothing, or nonsense, costs nobody.
func TestNonsenseOnTheSocket(t *testing.T) {
	name := fmt.Sprintf("control-nonsense-%d", os.Getpid())
	ln, err := Listen(name)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	donec := make(chan error, 1)
	go func() {
		donec <- Serve(ctx, ln, func(context.Context, Request, []*os.File, <-chan syscall.Signal, *Writer) int { return 7 })
	}()
	for _, s := range []string{"", "\n", "{", "null\n", "\x00\xff\n", `{"Verb":1}` + "\n"} {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: Address(os.Getuid(), name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, s); err != nil {
			t.Fatal(err)
		}
	}
	if code, err := Do(t.Context(), name, Request{Verb: "x"}, nil, io.Discard, io.Discard); code != 7 || err != nil {
		t.Errorf("a command beside the nonsense: %d, %v", code, err)
	}
	cancel()
	if err := <-donec; err != nil {
		t.Fatal(err)
	}
}
