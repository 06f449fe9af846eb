package hbone

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// TestWaitsNameWhatWasMissing: each wait counts for the bound that caused it,
// and writes that do not wait count for none.
func TestWaitsNameWhatWasMissing(t *testing.T) {
	const window = 1 << 20
	for _, tt := range []struct {
		name    string
		prepare func(w *writer, s *Stream)
		provide func(w *writer, s *Stream)
		want    [3]time.Duration
	}{
		{"nothing", func(w *writer, s *Stream) {}, func(w *writer, s *Stream) {}, [3]time.Duration{}},
		{"the stream's window", func(w *writer, s *Stream) { s.sendWindow = 0 }, func(w *writer, s *Stream) { s.sendWindow = window }, [3]time.Duration{0: time.Minute}},
		{"the tunnel's window", func(w *writer, s *Stream) { w.window = 0 }, func(w *writer, s *Stream) { w.window = window }, [3]time.Duration{1: time.Minute}},
		{"the tunnel's queue", func(w *writer, s *Stream) { w.queued = 2 * queueLimit }, func(w *writer, s *Stream) { w.queued = 0 }, [3]time.Duration{2: time.Minute}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tun, _ := looseTunnel()
				w, s := tun.w, tun.newStream(1)
				s.sendWindow, w.window = window, window
				tt.prepare(w, s)
				donec := make(chan error, 1)
				go func() {
					_, err := s.Write([]byte("x"))
					donec <- err
				}()
				synctest.Wait()
				time.Sleep(time.Minute)
				w.mu.Lock()
				tt.provide(w, s)
				s.sendCond.Broadcast()
				w.mu.Unlock()
				if err := <-donec; err != nil {
					t.Fatal(err)
				}
				var got [3]time.Duration
				got[0], got[1], got[2] = s.Waits()
				if got != tt.want {
					t.Errorf("waited %v, want %v", got, tt.want)
				}
			})
		})
	}
}

func TestTunnelAndHandshakeMetrics(t *testing.T) {
	m := newMetrics(prometheus.NewRegistry())
	value := func(c prometheus.Metric) float64 {
		var d dto.Metric
		if err := c.Write(&d); err != nil {
			t.Fatal(err)
		}
		return d.GetGauge().GetValue() + d.GetCounter().GetValue()
	}
	first, second := m.open(clientSide), m.open(clientSide)
	if got := value(m.tunnels.WithLabelValues(clientSide)); got != 2 {
		t.Errorf("%v tunnels open", got)
	}
	first()
	second()
	if got := value(m.tunnels.WithLabelValues(clientSide)); got != 0 {
		t.Errorf("%v tunnels open after their end", got)
	}
	m.handshake(serverSide, &ServeError{Stage: StageLocal, Err: ErrTooManyHandshakes})
	if got := value(m.handshakes.WithLabelValues(serverSide, "limited")); got != 1 {
		t.Errorf("%v handshakes limited", got)
	}
}
