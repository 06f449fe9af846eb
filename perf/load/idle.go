package load

import (
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// dialling is how many connections are opened at once: below any listen queue.
const dialling = 32

// idle opens connections, proves each with one request, waits and looks at the
// memory of what holds them. The look before the first is the other one.
func (r *run) idle(watch []Process) (Result, error) {
	before, err := look(watch)
	if err != nil {
		return Result{}, err
	}
	conns := make([]net.Conn, 0, r.Conns)
	defer func() {
		for _, c := range conns {
			_ = c.Close() // nothing is under way on it
		}
	}()
	var mu sync.Mutex // guards conns
	var live sync.WaitGroup
	slots := make(chan struct{}, dialling)
	for range r.Conns {
		if slots <- struct{}{}; r.faults() > dialling {
			break // whoever refuses so many refuses the others too
		}
		live.Go(func() {
			defer func() { <-slots }()
			b := open(verbAnswer, r.Size)
			c, err := r.dial(b)
			if err == nil {
				_ = c.SetDeadline(time.Now().Add(r.Timeout)) // a fresh connection takes it
				if _, err = io.ReadFull(c, b); err != nil {
					r.close(c)
				}
			}
			if err != nil {
				r.fault(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			conns = append(conns, c)
		})
	}
	live.Wait()
	if len(conns) == 0 {
		return Result{}, fmt.Errorf("open %d connections: %s", r.Conns, r.first)
	}
	if err := r.wait(r.For); err != nil {
		return Result{}, err
	}
	after, err := look(watch)
	if err != nil {
		return Result{}, err
	}
	out := between(before, after)
	out.Ops, out.Errors, out.Error = uint64(len(conns)), r.errors, r.first
	return out, nil
}
