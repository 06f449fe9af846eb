package main

import (
	"errors"
	"io"
	"testing"
)

// TestHold: the lab is ended when the input has ended, not before, and one that is
// still being started is waited for.
func TestHold(t *testing.T) {
	r, w := io.Pipe()
	asked := make(chan struct{})
	donec := make(chan error, 1)
	tries, pauses := 0, 0
	go func() {
		donec <- hold(r, func() error {
			if tries++; tries == 1 {
				close(asked)
			}
			if tries < 3 {
				return errors.New("no lab runs")
			}
			return nil
		}, func() { pauses++ })
	}()
	if _, err := w.Write([]byte("alive")); err != nil { // read, and of no interest
		t.Fatal(err)
	}
	select {
	case <-asked:
		t.Fatal("the lab was ended before its input")
	default:
	}
	if err := w.CloseWithError(errors.New("whoever wrote is gone")); err != nil {
		t.Fatal(err)
	}
	if err := <-donec; err != nil || tries != 3 || pauses != 2 {
		t.Errorf("%d tries, %d pauses, %v", tries, pauses, err)
	}
}

// TestHoldGivesUp: a lab that never was is not waited for without end.
func TestHoldGivesUp(t *testing.T) {
	r, w := io.Pipe()
	_ = w.Close() // it cannot fail
	tries := 0
	if err := hold(r, func() error { tries++; return errors.New("no lab runs") }, func() {}); !errors.Is(err, errStillThere) || tries != holdFor {
		t.Errorf("%d tries, %v", tries, err)
	}
}
