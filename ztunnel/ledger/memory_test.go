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
