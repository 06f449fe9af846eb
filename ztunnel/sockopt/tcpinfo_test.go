package sockopt

import (
	"io"
	"net"
	"os"
	"runtime"
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

// A connection has ended when both ends are done and all has arrived, read or not. Until then a close may reset it.
func TestInfoTellsTheEnd(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	d, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	a, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	first, second := d.(*net.TCPConn), a.(*net.TCPConn)
	ended := func(c *net.TCPConn) bool {
		info, err := Info(c)
		if err != nil {
			t.Fatal(err)
		}
		return info.Ended
	}
	if ended(first) || ended(second) {
		t.Error("ended before it began")
	}
	if _, err := second.Write([]byte("last words")); err != nil {
		t.Fatal(err)
	}
	_ = first.CloseWrite()
	if ended(first) || ended(second) {
		t.Error("ended by one of two")
	}
	_ = second.CloseWrite()
	for !ended(first) || !ended(second) { // within a host that takes no time
		runtime.Gosched()
	}
	if err := Reset(second); err != nil {
		t.Error(err)
	}
	if b, err := io.ReadAll(first); string(b) != "last words" || err != nil {
		t.Errorf("read %q, %v behind a close that resets", b, err)
	}
}
