package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/ambit-mesh/ambit/test/lab/app"
	"github.com/ambit-mesh/ambit/test/lab/control"
	"github.com/ambit-mesh/ambit/test/lab/sandbox"
	"github.com/ambit-mesh/ambit/xds/boot"
)

// The daemon's verb and the descriptors it is handed: the control socket.
const (
	daemonVerb  = "daemon"
	daemonFiles = 1
)

// shape is what `up` hands to the daemon.
type shape struct {
	Name, Mode, Bin string
	Nodes           int
	NoMesh          bool
	SecretTTL       time.Duration
	Redirect        string
	NoEBPF          string
	ZTunnel         map[string]string
	Env             []string
}

// up starts a lab and waits until it is ready.
func up(ctx context.Context, o options, stdout, stderr io.Writer) int {
	lab, err := start(ctx, o, stderr)
	if errors.Is(err, control.ErrRunning) {
		fmt.Fprintf(stdout, "a lab of this name runs already; `ambit-lab --name OTHER up` starts a second one\n")
		code, err := control.Do(ctx, o.name, control.Request{Verb: "status"}, nil, stdout, stderr)
		if err != nil {
			return fail(stderr, 1, err)
		}
		return code
	}
	if err != nil {
		return fail(stderr, 1, err)
	}
	if o.file != "" {
		if err := lab.apply(ctx, o.file, stdout, stderr); err != nil {
			lab.kill()
			return fail(stderr, 1, err)
		}
	}
	lab.leave()
	if code, err := control.Do(ctx, o.name, control.Request{Verb: "status"}, nil, stdout, stderr); err != nil || code != 0 {
		return 1
	}
	fmt.Fprintf(stdout, "try: ambit-lab apply -f bookinfo; ambit-lab label ns default istio.io/dataplane-mode=ambient; ambit-lab down\n")
	return 0
}

// lab is a lab this process started and still watches.
type lab struct {
	name    string
	process *os.Process
	output  *os.File
}

// start launches the daemon and waits until the lab is ready. A lab that does not
// become ready, or whose start is interrupted, is ended.
func start(ctx context.Context, o options, stderr io.Writer) (*lab, error) {
	ln, err := control.Listen(o.name)
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	mode, err := sandbox.Detect()
	if err != nil {
		return nil, err
	}
	redirect, err := chooseRedirect(o, mode, stderr)
	if err != nil {
		return nil, err
	}
	if err := sandbox.Sweep(o.name); err != nil {
		return nil, err
	}
	socket, err := ln.File()
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	s := shape{Name: o.name, Mode: mode.String(), Bin: filepath.Dir(self), Nodes: o.nodes, NoMesh: o.noMesh, ZTunnel: map[string]string(o.ztunnel), Env: o.env,
		Redirect: redirect, NoEBPF: mode.NoEBPF}
	if o.secretTTL != "" {
		if s.SecretTTL, err = time.ParseDuration(o.secretTTL); err != nil {
			return nil, fmt.Errorf("--secret-ttl: %w", err)
		}
	}
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p, err := sandbox.Start(mode, o.name, []string{string(b)}, os.Environ(), w, socket)
	_ = w.Close() // the child has its own
	if err != nil {
		return nil, err
	}
	l := &lab{name: o.name, process: p, output: r}
	go l.listen(stderr)
	_ = socket.Close() // with ours open, a lab that died would not refuse connections
	_ = ln.Close()     // as above; it has no file to remove
	code, err := control.Do(ctx, o.name, control.Request{Verb: "ready"}, nil, stderr, stderr)
	if err != nil || code != 0 {
		l.kill()
		if ctx.Err() != nil {
			return nil, errors.New("interrupted; nothing was left behind")
		}
		if err == nil {
			err = errors.New("the lab did not become ready and was ended")
		}
		return nil, err
	}
	return l, nil
}

// listen passes on what the daemon says before it has its own log.
func (l *lab) listen(stderr io.Writer) {
	sc := bufio.NewScanner(l.output)
	for sc.Scan() {
		fmt.Fprintln(stderr, sc.Text())
	}
}

func (l *lab) apply(ctx context.Context, file string, stdout, stderr io.Writer) error {
	b, err := manifests(file)
	if err != nil {
		return err
	}
	code, err := control.Do(ctx, l.name, control.Request{Verb: "apply", Input: b, Flags: map[string]string{"filename": file}}, nil, stdout, stderr)
	if err == nil && code != 0 {
		err = fmt.Errorf("apply %s failed", file)
	}
	return err
}

// kill ends the lab at once: with its first process go all others.
func (l *lab) kill() {
	_ = l.process.Kill() // it may have ended by itself
	_, _ = l.process.Wait()
	_ = sandbox.Sweep(l.name) // the next command tries again
}

// chooseRedirect says why connections are redirected otherwise than they could be.
func chooseRedirect(o options, mode sandbox.Mode, stderr io.Writer) (string, error) {
	switch o.redirect {
	case "auto":
		if mode.NoEBPF != "" && !o.noMesh {
			fmt.Fprintf(stderr, "redirection by nftables; eBPF not available: %s\n", mode.NoEBPF)
		}
	case "nftables":
	case "ebpf":
		if mode.NoEBPF != "" {
			return "", fmt.Errorf("--redirect ebpf: eBPF not available: %s", mode.NoEBPF)
		}
	default:
		return "", fmt.Errorf("--redirect %s: want auto, ebpf or nftables", o.redirect)
	}
	return o.redirect, nil
}

// leave lets the lab run on by itself.
func (l *lab) leave() { _ = l.process.Release() }

// daemon is the lab itself, inside the sandbox.
func daemon(args []string) int {
	var s shape
	if len(args) != 1 || json.Unmarshal([]byte(args[0]), &s) != nil {
		fmt.Fprintln(os.Stderr, "this verb is used by the lab itself")
		return 2
	}
	ln, err := net.FileListener(os.NewFile(3, "control"))
	if err != nil {
		return fail(os.Stderr, 1, err)
	}
	listener, ok := ln.(*net.UnixListener)
	if !ok {
		return fail(os.Stderr, 1, errors.New("descriptor 3 is no unix socket"))
	}
	log, err := os.OpenFile(app.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY|syscall.O_CLOEXEC, 0o644)
	if err != nil {
		return fail(os.Stderr, 1, err)
	}
	logger, _ := boot.NewLogger(log, "text", "info")
	ctx, stop := boot.SignalContext(context.Background())
	defer stop()
	err = app.Run(ctx, app.Config{Name: s.Name, Mode: s.Mode, Nodes: s.Nodes, NoMesh: s.NoMesh, Bin: s.Bin, SecretTTL: s.SecretTTL, ZTunnel: s.ZTunnel, Env: s.Env,
		Redirect: s.Redirect, NoEBPF: s.NoEBPF, Listener: listener, Log: logger.With(slog.String("scope", "lab"))})
	if err != nil {
		return fail(os.Stderr, 1, err)
	}
	return 0
}
