package sockets

import (
	"io"
	"testing"
)

func TestPairIsOneConnection(t *testing.T) {
	a, b := Pair(t)
	if a.LocalAddr().String() != b.RemoteAddr().String() || a.RemoteAddr().String() != b.LocalAddr().String() {
		t.Errorf("%s-%s and %s-%s", a.LocalAddr(), a.RemoteAddr(), b.LocalAddr(), b.RemoteAddr())
	}
	if _, err := a.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	_ = a.CloseWrite()
	if got, err := io.ReadAll(b); string(got) != "x" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
}
