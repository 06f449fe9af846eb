package load

import (
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func TestPinMovesAProcessAndLetsItGo(t *testing.T) {
	if runtime.NumCPU() < 2 {
		t.Skip("one CPU")
	}
	var mine unix.CPUSet
	if err := unix.SchedGetaffinity(0, &mine); err != nil || mine.Count() < 2 || !mine.IsSet(clientCPU) || !mine.IsSet(serverCPU) {
		t.Skipf("this process may not use CPUs %d and %d: %v", clientCPU, serverCPU, err)
	}
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = in.Close() // ends it
		_ = cmd.Wait()
	}()
	for _, want := range []unix.CPUSet{only(serverCPU), mine} {
		if err := pin(cmd.Process.Pid, want); err != nil {
			t.Fatal(err)
		}
		var got unix.CPUSet
		if err := unix.SchedGetaffinity(cmd.Process.Pid, &got); err != nil || got != want {
			t.Errorf("it may use %v, want %v: %v", got, want, err)
		}
	}
	if _, err := pinned(nil); err == nil {
		t.Error("a client without a server was pinned")
	}
	if err := pin(unix.Getpid(), mine); err != nil { // what pinned did to this process
		t.Fatal(err)
	}
}
