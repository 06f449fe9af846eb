package sockopt

import (
	"net"
	"os"
	"testing"
	"time"
)

// A receiver that does not read shows as time limited by its window.
func TestInfoTellsAReaderThatDoesNotRead(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	tcp := c.(*net.TCPConn)
	start, err := Info(tcp)
	if err != nil {
		t.Fatal(err)
	}
	if start.RTT == 0 || start.RwndLimited != 0 || start.Retransmits != 0 {
		t.Errorf("a fresh connection: %+v", start)
	}
	donec := make(chan struct{})
	go func() {
		defer close(donec)
		b := make([]byte, 64<<10)
		for {
			if _, err := c.Write(b); err != nil {
				return // the deadline below
			}
		}
	}()
	for {
		now, err := Info(tcp)
		if err != nil {
			t.Fatal(err)
		}
		if since := now.Since(start); since.RwndLimited > 0 && since.Busy >= since.RwndLimited {
			break
		}
	}
	if err := c.SetDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	<-donec
	_ = c.Close()
	if _, err := Info(tcp); err == nil {
		t.Error("a closed socket has no TCP_INFO")
	} else if os.IsTimeout(err) {
		t.Error(err)
	}
}
