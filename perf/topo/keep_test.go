package topo

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// TestKeeper: a lab does not outlive whoever started it, however that ends.
func TestKeeper(t *testing.T) {
	if bin := os.Getenv("TOPO_KEEPER_BIN"); bin != "" { // who is killed
		if _, err := keep(bin, "perf-of-the-test"); err != nil {
			t.Fatal(err)
		}
		fmt.Println("kept")
		select {}
	}
	bin := t.TempDir()
	told := filepath.Join(bin, "told")
	if err := syscall.Mkfifo(told, 0o600); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\ncat >/dev/null\necho \"$@\" > %s\n", told)
	if err := os.WriteFile(filepath.Join(bin, "ambit-lab"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestKeeper$")
	cmd.Env = append(os.Environ(), "TOPO_KEEPER_BIN="+bin)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	have, err := os.ReadFile(told)
	if err != nil || string(have) != "--name perf-of-the-test hold\n" {
		t.Errorf("the lab was told %q, %v", have, err)
	}
}

// TestKeeperReleased: a lab that has ended is not ended again.
func TestKeeperReleased(t *testing.T) {
	bin := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\ncat >/dev/null\ntouch %s/told\n", bin)
	if err := os.WriteFile(filepath.Join(bin, "ambit-lab"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	k, err := keep(bin, "perf-of-the-test")
	if err != nil {
		t.Fatal(err)
	}
	k.release()
	if _, err := os.Stat(filepath.Join(bin, "told")); err == nil {
		t.Error("the lab was ended")
	}
}
