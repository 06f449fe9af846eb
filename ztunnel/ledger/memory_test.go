package ledger

import "testing"

// What streams may hold without asking, and what is granted to them, leaves most of the memory for what they are.
func TestMemory(t *testing.T) {
	d := DefaultLimits()
	for _, tt := range []struct {
		memory, connections, bytes, unasked int64
	}{
		{0, d[Connections], d[Bytes], 0},
		{1, fewestConnections, fewestBytes, fewestUnasked},
		{16 << 20, fewestConnections, fewestBytes, fewestUnasked},
		{64 << 20, 2048, 4 << 20, fewestUnasked},
		{256 << 20, 14336, 28 << 20, fewestUnasked},
		{32<<20 + 16<<30, d[Connections], d[Bytes], 16 << 10},
		{1 << 40, d[Connections], d[Bytes], 1<<20 - 32},
	} {
		limits, unasked := fitting(tt.memory)
		if limits[Connections] != tt.connections || limits[Streams] != tt.connections || limits[Bytes] != tt.bytes || unasked != tt.unasked {
			t.Errorf("%d: %v, %d unasked, want %d connections, %d bytes and %d", tt.memory, limits, unasked, tt.connections, tt.bytes, tt.unasked)
		}
	}
	l := New(d)
	a := l.Pod("a")
	if n := l.SetMemory(64 << 20); n != 2048 || a.Unasked() != fewestUnasked || a.TryAcquire(Bytes, 4<<20+1) || !a.TryAcquire(Streams, 2048) || a.TryAcquire(Streams, 1) {
		t.Errorf("%d connections, %d unasked", n, a.Unasked())
	}
	if n := l.SetMemory(0); n != d[Connections] || a.Unasked() != 0 || !a.TryAcquire(Bytes, 4<<20+1) {
		t.Error("a limit that was taken away is one")
	}
	if (*Account)(nil).Unasked() != 0 {
		t.Error("nobody's account has a limit")
	}
}

// The more there are, and the less memory there is, the less a socket may hold.
func TestBuffers(t *testing.T) {
	for _, tt := range []struct {
		memory int64
		want   map[int64]int // by how many there are
	}{
		{0, map[int64]int{1: 0, 64: 0, 65: boundBuffer, 10_000: boundBuffer}},
		{16 << 20, map[int64]int{1: smallBuffer}},
		{64 << 20, map[int64]int{4: 0, 5: boundBuffer, 89: boundBuffer, 90: smallBuffer}},
		{256 << 20, map[int64]int{28: 0, 29: boundBuffer, 625: boundBuffer, 626: smallBuffer}},
		{16 << 30, map[int64]int{64: 0, 65: boundBuffer, 45_000: boundBuffer, 47_000: smallBuffer}},
	} {
		for n, want := range tt.want {
			l := New(DefaultLimits())
			l.SetMemory(tt.memory)
			a, b := l.Pod("a"), l.Pod("b")
			if !a.TryAcquire(Streams, n/2) || !a.TryAcquire(Connections, n-n/2) {
				t.Fatal("refused")
			}
			if got := a.Buffers(); got != want {
				t.Errorf("memory of %d, connection %d: %d, want %d", tt.memory, n, got, want)
			}
			if got := b.Buffers(); tt.memory == 0 && got != 0 {
				t.Errorf("without a limit, the first of a pod beside one with %d: %d", n, got)
			}
		}
	}
	if (*Account)(nil).Buffers() != 0 {
		t.Error("nobody's account bounds buffers")
	}
}
