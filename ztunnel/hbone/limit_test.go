package hbone

import (
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"
)

// TestPeersLimitsHold: a peer says how many streams it takes, as an Envoy does;
// the one beyond goes through another tunnel. What the client announces is the
// reference's.
func TestPeersLimitsHold(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var tunnels atomic.Int32
		d, k := dialTo(t, DialerConfig{}, func(n int, f *framer) {
			tunnels.Add(1)
			_, _ = io.ReadFull(f.conn, make([]byte, len(http2.ClientPreface)))
			sf, ok := f.next("client's SETTINGS").(*http2.SettingsFrame)
			if !ok {
				t.Error("first frame is not SETTINGS")
				return
			}
			for id, want := range map[http2.SettingID]uint32{http2.SettingEnablePush: 0, http2.SettingMaxHeaderListSize: 16 << 10, http2.SettingMaxFrameSize: 1 << 20} {
				if got, ok := sf.Value(id); !ok || got != want {
					t.Errorf("SETTINGS %v = %d, want %d", id, got, want)
				}
			}
			f.ok(f.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 2}))
			f.ok(f.WriteSettingsAck())
			for {
				id := f.nextConnect()
				if id == 0 {
					return
				}
				f.answer(id)
			}
		})
		for i := range 5 {
			s, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1"})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			synctest.Wait()
			if got, want := int(tunnels.Load()), i/2+1; got != want {
				t.Errorf("%d streams are in %d tunnels, want %d", i+1, got, want)
			}
		}
	})
}
