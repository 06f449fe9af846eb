package topo

import (
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"syscall"
)

// keeper ends the lab when this process cannot: killed, hung up, or told twice to
// stop. It knows by a pipe whose other end only this process has. A lab that was
// still being started then is waited for.
type keeper struct {
	cmd  *exec.Cmd
	life io.Closer
}

func keep(bin, lab string) (*keeper, error) {
	cmd := exec.Command(filepath.Join(bin, "ambit-lab"), "--name", lab, "hold")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // what a terminal tells this process is not for it
	life, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe to the lab's keeper: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the lab's keeper: %w", err)
	}
	return &keeper{cmd, life}, nil
}

// release lets it go, the lab having ended.
func (k *keeper) release() {
	_ = k.cmd.Process.Kill() // it has nothing to do any more
	_ = k.life.Close()
	_ = k.cmd.Wait() // killed
}
