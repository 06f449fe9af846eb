package main

import (
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// TestSignals: one signal ends a measurement in order, also where it is sent twice
// at once; who insists does not have to wait.
func TestSignals(t *testing.T) {
	for name, tt := range map[string]struct {
		at   []time.Duration
		exit bool
	}{
		"none": {}, "once": {at: []time.Duration{0}}, "twice at once": {at: []time.Duration{0, 0}}, "insists": {at: []time.Duration{0, 3 * time.Second}, exit: true},
	} {
		synctest.Test(t, func(t *testing.T) {
			sigc := make(chan os.Signal)
			donec := make(chan struct{})
			ended, exited := 0, false
			go func() {
				defer close(donec)
				obey(sigc, func() { ended++ }, func(int) { exited = true })
			}()
			began := time.Now()
			for _, at := range tt.at {
				time.Sleep(at - time.Since(began))
				sigc <- os.Interrupt
			}
			close(sigc)
			<-donec
			if ended != min(len(tt.at), 1) || exited != tt.exit {
				t.Errorf("%s: ended %d times, exited: %t", name, ended, exited)
			}
		})
	}
}
