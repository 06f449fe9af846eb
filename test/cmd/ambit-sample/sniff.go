package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// capture is what was seen on an interface.
type capture struct {
	Interface string `json:"interface"`
	Packets   int    `json:"packets"`
	Bytes     int    `json:"bytes"`
	Marker    int    `json:"marker"` // packets that hold the marker in clear text
	TLS       int    `json:"tls"`    // TLS application data records (RFC 8446 §5.1)
	HBONE     int    `json:"hbone"`  // TCP packets from or to port 15008
}

// sniff looks at all packets of an interface until it is told to end: INTERFACE
// MARKER, and for how long if not until a signal. It prints "ready" first and
// what it saw last.
func sniff(ctx context.Context, args []string, out io.Writer) error {
	if len(args) < 2 || len(args) > 3 {
		return errors.New("sniff wants INTERFACE MARKER [DURATION]")
	}
	if len(args) == 3 {
		d, err := time.ParseDuration(args[2])
		if err != nil {
			return err
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	ifi, err := net.InterfaceByName(args[0])
	if err != nil {
		return fmt.Errorf("find %s: %w", args[0], err)
	}
	all := binary.BigEndian.Uint16([]byte{0, unix.ETH_P_ALL})
	all = all<<8 | all>>8 // network byte order
	// Without a protocol it receives nothing, of no interface, until it is bound to one.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open packet socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifi.Index}); err != nil {
		return fmt.Errorf("listen on %s: %w", args[0], err)
	}
	// A short time-out lets the end be noticed without closing a descriptor in use.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}); err != nil {
		return err
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 8<<20) // fewer losses, if allowed
	fmt.Fprintln(out, "ready")
	c, buf := capture{Interface: args[0]}, make([]byte, 256<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == nil {
			c.count(buf[:n], []byte(args[1]))
			continue
		}
		if ctx.Err() != nil {
			return json.NewEncoder(out).Encode(c)
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (c *capture) count(packet, marker []byte) {
	c.Packets++
	c.Bytes += len(packet)
	if bytes.Contains(packet, marker) {
		c.Marker++
	}
	if tcp := tcpOf(packet); len(tcp) >= 20 {
		if binary.BigEndian.Uint16(tcp) == 15008 || binary.BigEndian.Uint16(tcp[2:]) == 15008 {
			c.HBONE++
		}
		if data := int(tcp[12]>>4) * 4; len(tcp) > data+3 && tcp[data] == 23 && tcp[data+1] == 3 {
			c.TLS++
		}
	}
}

// tcpOf returns the TCP part of an IP packet without extension headers, or nil.
func tcpOf(p []byte) []byte {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4 && p[9] == unix.IPPROTO_TCP && len(p) >= int(p[0]&15)*4:
		return p[int(p[0]&15)*4:]
	case len(p) >= 40 && p[0]>>4 == 6 && p[6] == unix.IPPROTO_TCP:
		return p[40:]
	}
	return nil
}
