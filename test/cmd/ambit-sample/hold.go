package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// hold opens many connections to a TCP echo server, sends a byte over each, and
// leaves them idle; then it sends another byte over each. It prints how many
// were open, and how many still worked.
func hold(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("hold", flag.ContinueOnError)
	n := fs.Int("n", 1000, "connections")
	for_ := fs.Duration("for", 5*time.Second, "how long they are idle")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() != 1 || *n < 1 {
		return errors.New("hold wants HOST:PORT of a TCP echo server, and at least one connection")
	}
	var (
		opened, kept atomic.Int64
		opening      sync.WaitGroup
		ended        sync.WaitGroup
		idle         = make(chan struct{})
		dialling     = make(chan struct{}, 64)
	)
	beat := func(c net.Conn) bool {
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		if _, err := c.Write([]byte{1}); err != nil {
			return false
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err == nil
	}
	for range *n {
		opening.Add(1)
		dialling <- struct{}{}
		ended.Go(func() {
			c, err := net.DialTimeout("tcp", fs.Arg(0), 10*time.Second)
			ok := err == nil && beat(c)
			<-dialling
			if ok {
				opened.Add(1)
			}
			opening.Done()
			if err != nil {
				return
			}
			defer c.Close()
			<-idle
			if ok && beat(c) {
				kept.Add(1)
			}
		})
	}
	opening.Wait()
	report := json.NewEncoder(out)
	if err := report.Encode(map[string]int64{"open": opened.Load()}); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case <-time.After(*for_):
	}
	close(idle)
	ended.Wait()
	return report.Encode(map[string]int64{"kept": kept.Load()})
}
