package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// call is the client: one request of the URL's kind, its answer printed.
func call(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("call", flag.ContinueOnError)
	message := fs.String("message", "hello", "what is sent")
	greeting := fs.Bool("greeting", false, "read the server's first line before sending")
	timeout := fs.Duration("timeout", 10*time.Second, "how long to wait")
	hold := fs.Bool("hold", false, "keep a TCP connection and send once a second until it breaks")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() != 1 {
		return errors.New("call wants one URL: http://, grpc://, tcp:// or udp://")
	}
	u, err := url.Parse(fs.Arg(0))
	if err != nil {
		return err
	}
	if !*hold {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, *timeout)
		defer cancel()
	}
	switch u.Scheme {
	case "http", "https":
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), strings.NewReader(*message))
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		fmt.Fprintln(out, resp.Proto, resp.Status)
		_, err = io.Copy(out, resp.Body)
		return err
	case "grpc":
		cc, err := grpc.NewClient("passthrough:///"+u.Host, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		defer cc.Close()
		reply := new(wrapperspb.StringValue)
		if err := cc.Invoke(ctx, "/ambit.sample.Echo/Echo", wrapperspb.String(*message), reply); err != nil {
			return err
		}
		fmt.Fprintln(out, reply.GetValue())
		return nil
	case "tcp", "udp":
		return exchange(ctx, u, *message, *greeting, *hold, out)
	}
	return fmt.Errorf("scheme %q: want http, grpc, tcp or udp", u.Scheme)
}

// exchange sends a message over TCP or UDP and prints what comes back.
func exchange(ctx context.Context, u *url.URL, message string, greeting, hold bool, out io.Writer) error {
	c, err := (&net.Dialer{}).DialContext(ctx, u.Scheme, u.Host)
	if err != nil {
		return err
	}
	defer c.Close()
	if d, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(d); err != nil {
			return err
		}
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	buf := make([]byte, 64<<10)
	read := func() error {
		n, err := c.Read(buf)
		if err != nil {
			return fmt.Errorf("read from %s: %w", c.RemoteAddr(), err)
		}
		fmt.Fprintf(out, "%s\n", strings.TrimRight(string(buf[:n]), "\n"))
		return nil
	}
	if greeting {
		if err := read(); err != nil {
			return err
		}
	}
	for {
		if _, err := io.WriteString(c, message+"\n"); err != nil {
			return err
		}
		if err := read(); err != nil || !hold {
			return err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return nil
		}
	}
}
