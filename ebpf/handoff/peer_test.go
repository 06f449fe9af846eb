package handoff_test

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
)

// TestCallerThatEnds has the process end while it is being asked about: what is read
// of it by its number from then on may be another's.
func TestCallerThatEnds(t *testing.T) {
	type seen struct{ alive, ended error }
	seenc, diec, deadc := make(chan seen, 1), make(chan struct{}), make(chan struct{})
	a := startAgent(t, handoff.ServerConfig{Admit: func(c *handoff.Caller) error {
		var s seen
		s.alive = c.Alive()
		close(diec)
		<-deadc
		s.ended = c.Alive()
		seenc <- s
		return errors.New("not this time")
	}})
	// Another process connects in our name: it greets, and waits to be killed.
	cmd := exec.Command(os.Args[0], "-test.run=TestCallerProcess$")
	cmd.Env = append(os.Environ(), "AMBIT_TEST_CALL="+a.path)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-diec
	if err := errors.Join(cmd.Process.Kill(), ignoreExit(cmd.Wait())); err != nil {
		t.Fatal(err)
	}
	close(deadc)
	if s := <-seenc; s.alive != nil || s.ended == nil || !strings.Contains(s.ended.Error(), "has ended") {
		t.Errorf("alive: %v; ended: %v", s.alive, s.ended)
	}
}

func ignoreExit(err error) error {
	if _, ok := errors.AsType[*exec.ExitError](err); ok {
		return nil
	}
	return err
}

// TestCallerProcess is that process.
func TestCallerProcess(t *testing.T) {
	path := os.Getenv("AMBIT_TEST_CALL")
	if path == "" {
		return // it is a test of its own only by name
	}
	c, err := net.Dial("unixpacket", filepath.Clean(path))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte{8, 1}); err != nil { // ZdsHello{version: V1}
		t.Fatal(err)
	}
	_ = unix.Pause()
	_, _ = c.Read(make([]byte, 1))
}
