package kubelet

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// watch runs one probe until ctx ends and reports a success when the threshold of
// successes is reached, and a failure each time that of failures is.
func (c *container) watch(ctx context.Context, p *corev1.Probe, report func(ok bool, why error)) {
	if !wait(ctx, seconds(p.InitialDelaySeconds, 0)) {
		return
	}
	period := seconds(p.PeriodSeconds, 10)
	successes, failures := int32(0), int32(0)
	for {
		err := c.try(ctx, p)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			successes, failures = successes+1, 0
			if successes == cmp.Or(p.SuccessThreshold, 1) {
				report(true, nil)
			}
		} else {
			successes, failures = 0, failures+1
			if failures == cmp.Or(p.FailureThreshold, 3) {
				report(false, err)
				failures = 0
			}
		}
		pause := period
		if successes == 0 {
			// A program that is starting is asked more often than Kubernetes would,
			// because a person is waiting.
			pause = min(period, 200*time.Millisecond)
		}
		if !wait(ctx, pause) {
			return
		}
	}
}

func seconds(n, otherwise int32) time.Duration {
	return time.Duration(cmp.Or(n, otherwise)) * time.Second
}

// wait sleeps; false means that ctx ended.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// try asks once. Requests come from the node, as a kubelet's do.
func (c *container) try(ctx context.Context, p *corev1.Probe) error {
	ctx, cancel := context.WithTimeout(ctx, seconds(p.TimeoutSeconds, 1))
	defer cancel()
	switch {
	case p.HTTPGet != nil:
		return c.httpGet(ctx, p.HTTPGet)
	case p.TCPSocket != nil:
		conn, err := c.dial(ctx, p.TCPSocket.Host, p.TCPSocket.Port)
		if err != nil {
			return err
		}
		return conn.Close()
	case p.GRPC != nil:
		return c.grpcCheck(ctx, p.GRPC)
	case p.Exec != nil:
		return c.execCheck(ctx, p.Exec.Command)
	}
	return errors.New("probe without httpGet, tcpSocket, grpc or exec")
}

func (c *container) port(p intstr.IntOrString) (int, error) {
	if p.Type == intstr.Int {
		return int(p.IntVal), nil
	}
	for _, cp := range c.spec.Ports {
		if cp.Name == p.StrVal {
			return int(cp.ContainerPort), nil
		}
	}
	return strconv.Atoi(p.StrVal)
}

func (c *container) dial(ctx context.Context, host string, p intstr.IntOrString) (net.Conn, error) {
	port, err := c.port(p)
	if err != nil {
		return nil, fmt.Errorf("port %s: %w", p.String(), err)
	}
	at := net.JoinHostPort(cmp.Or(host, c.pod.addrs[0].String()), strconv.Itoa(port))
	return c.pod.machine.NS.Dial(ctx, &net.Dialer{}, "tcp", at)
}

func (c *container) httpGet(ctx context.Context, g *corev1.HTTPGetAction) error {
	t := &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, // a kubelet does not verify either
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx, g.Host, g.Port) },
	}
	scheme := "http"
	if g.Scheme == corev1.URISchemeHTTPS {
		scheme = "https"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://probe"+"/"+trimSlash(g.Path), nil)
	if err != nil {
		return err
	}
	req.Host = c.pod.addrs[0].String()
	req.Header.Set("User-Agent", "kube-probe/1.34")
	for _, h := range g.HTTPHeaders {
		if h.Name == "Host" {
			req.Host = h.Value
		}
		req.Header.Add(h.Name, h.Value)
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, 10<<10) // the status is the answer
	if resp.StatusCode < 200 || resp.StatusCode >= 400 {
		return fmt.Errorf("status %d", resp.StatusCode)
	}
	return nil
}

func trimSlash(p string) string {
	if p != "" && p[0] == '/' {
		return p[1:]
	}
	return p
}

func (c *container) grpcCheck(ctx context.Context, g *corev1.GRPCAction) error {
	cc, err := grpc.NewClient("passthrough:///probe", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return c.dial(ctx, "", intstr.FromInt32(g.Port))
		}))
	if err != nil {
		return err
	}
	defer cc.Close()
	service := ""
	if g.Service != nil {
		service = *g.Service
	}
	resp, err := healthpb.NewHealthClient(cc).Check(ctx, &healthpb.HealthCheckRequest{Service: service})
	if err != nil {
		return err
	}
	if resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		return fmt.Errorf("status %s", resp.GetStatus())
	}
	return nil
}

func (c *container) execCheck(ctx context.Context, argv []string) error {
	var in, out *os.File // nothing in, nothing kept
	p, err := c.start(argv, in, out, out)
	if err != nil {
		return err
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		p.Stop(0)
		return context.Cause(ctx)
	}
	if code, _ := p.Exit(); code != 0 {
		return fmt.Errorf("exit status %d", code)
	}
	return nil
}
