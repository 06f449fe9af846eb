// Package control is how the command line talks to a running lab: one connection
// per command, JSON lines, and the caller's own terminal passed along for `exec`.
//
// The socket is an abstract one (unix(7)): it has no file, and it is gone with the
// lab's last process. It is bound in the caller's network namespace before the lab
// gets its own. Only the user who started the lab may use it.
package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Request is one command.
type Request struct {
	Verb  string
	Args  []string          `json:",omitempty"`
	Flags map[string]string `json:",omitempty"`
	Input []byte            `json:",omitempty"`
}

// event is a line in either direction.
type event struct {
	Out    string         `json:",omitempty"`
	Err    string         `json:",omitempty"`
	Exit   *int           `json:",omitempty"`
	Signal syscall.Signal `json:",omitempty"`
}

// Address is the socket of a lab by name.
func Address(uid int, name string) string { return fmt.Sprintf("@ambit-lab/%d/%s", uid, name) }

// ErrRunning is returned by Listen when a lab of that name runs.
var ErrRunning = errors.New("a lab of this name runs already")

// ErrNotRunning is returned by Do when there is no lab of that name.
var ErrNotRunning = errors.New("no lab runs")

// Listen takes the name.
func Listen(name string) (*net.UnixListener, error) {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: Address(os.Getuid(), name), Net: "unix"})
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, ErrRunning
	}
	return ln, err
}

// Writer sends a command's output back. Its methods may be used from several
// goroutines.
type Writer struct {
	mu  sync.Mutex
	enc *json.Encoder // guarded by mu
}

// Printf writes to the caller's standard output.
func (w *Writer) Printf(format string, args ...any) {
	_ = w.send(event{Out: fmt.Sprintf(format, args...)}) // the command's context ends with the caller
}

// Errorf writes a line to the caller's standard error.
func (w *Writer) Errorf(format string, args ...any) {
	_ = w.send(event{Err: fmt.Sprintf(format, args...) + "\n"}) // as above
}

// Write makes Writer an io.Writer for standard output.
func (w *Writer) Write(b []byte) (int, error) { return len(b), w.send(event{Out: string(b)}) }

func (w *Writer) send(e event) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.enc.Encode(e)
}

// Handler does a command and returns its exit code. ctx ends when the caller
// leaves; the files are the caller's, closed after the return.
type Handler func(ctx context.Context, r Request, files []*os.File, signals <-chan syscall.Signal, w *Writer) int

// Serve answers until ctx ends.
func Serve(ctx context.Context, ln *net.UnixListener, h Handler) error {
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	var live sync.WaitGroup
	defer live.Wait()
	for {
		c, err := ln.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept command: %w", err)
		}
		live.Go(func() {
			defer c.Close()
			stop := context.AfterFunc(ctx, func() { _ = c.Close() })
			defer stop()
			serve(ctx, c, h)
		})
	}
}

// owner refuses other users: an abstract socket has no permissions of its own.
func owner(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if credErr != nil {
		return credErr
	}
	if int(cred.Uid) != os.Getuid() {
		return errors.New("this lab belongs to another user")
	}
	return nil
}

func serve(ctx context.Context, c *net.UnixConn, h Handler) {
	w := &Writer{enc: json.NewEncoder(c)}
	exit := func(code int) { _ = w.send(event{Exit: &code}) } // nobody is left to tell
	if err := owner(c); err != nil {
		w.Errorf("%v", err)
		exit(1)
		return
	}
	r, files, rest, err := readRequest(c)
	defer func() {
		for _, f := range files {
			_ = f.Close() // duplicates of the caller's
		}
	}()
	if err != nil {
		w.Errorf("read command: %v", err)
		exit(1)
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	signals := make(chan syscall.Signal, 8)
	go func() {
		defer cancel()
		dec := json.NewDecoder(io.MultiReader(rest, c))
		for {
			var e event
			if dec.Decode(&e) != nil {
				return
			}
			select {
			case signals <- e.Signal:
			default: // eight unread signals say enough
			}
		}
	}()
	exit(h(ctx, r, files, signals, w))
}

// maxRequest bounds a command; manifests are the largest part.
const maxRequest = 32 << 20

// readRequest reads the first line and the descriptors that came with it.
func readRequest(c *net.UnixConn) (Request, []*os.File, io.Reader, error) {
	var r Request
	buf, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4*4))
	n, oobn, _, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return r, nil, nil, err
	}
	files, err := received(oob[:oobn])
	if err != nil {
		return r, files, nil, err
	}
	br := bufio.NewReader(io.MultiReader(bytes.NewReader(buf[:n]), io.LimitReader(c, maxRequest)))
	line, err := br.ReadBytes('\n')
	if err != nil {
		return r, files, nil, err
	}
	rest, _ := br.Peek(br.Buffered()) // what is buffered is there
	return r, files, bytes.NewReader(rest), json.Unmarshal(line, &r)
}

func received(oob []byte) ([]*os.File, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "caller"))
		}
	}
	return files, nil
}

// errEnded is a lab that ended in the middle of a command.
var errEnded = errors.New("the lab ended before it answered")

// Down ends the lab of that name and returns when its name is free, so that the
// next `up` finds nothing of it.
func Down(ctx context.Context, name string, stdout, stderr io.Writer) (int, error) {
	code, err := Do(ctx, name, Request{Verb: "down"}, nil, stdout, stderr)
	if err != nil && !errors.Is(err, errEnded) {
		return code, err
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: Address(os.Getuid(), name), Net: "unix"})
		if errors.Is(err, syscall.ECONNREFUSED) {
			return 0, nil
		}
		if err == nil {
			_ = c.Close() // only its existence was asked for
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 130, context.Cause(ctx)
		}
	}
}

// Do runs a command in the lab of that name and returns its exit code. Signals of
// the calling process are passed on when files are.
func Do(ctx context.Context, name string, r Request, files []*os.File, stdout, stderr io.Writer) (int, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: Address(os.Getuid(), name), Net: "unix"})
	if errors.Is(err, syscall.ECONNREFUSED) {
		return 1, fmt.Errorf("%w under the name %q; start one: ambit-lab up", ErrNotRunning, name)
	}
	if err != nil {
		return 1, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	sigc := make(chan os.Signal, 8)
	if len(files) > 0 { // before there is a command that might be signalled
		signal.Notify(sigc, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
		defer signal.Stop(sigc)
	}
	if err := writeRequest(c, r, files); err != nil {
		return 1, err
	}
	if len(files) > 0 {
		donec := make(chan struct{})
		defer close(donec)
		go forward(c, sigc, donec)
	}
	dec := json.NewDecoder(c)
	for {
		var e event
		if err := dec.Decode(&e); err != nil {
			if ctx.Err() != nil {
				return 130, context.Cause(ctx)
			}
			return 1, fmt.Errorf("%w: %w", errEnded, err)
		}
		if e.Out != "" {
			_, _ = io.WriteString(stdout, e.Out) // as any program that prints
		}
		if e.Err != "" {
			_, _ = io.WriteString(stderr, e.Err) // as above
		}
		if e.Exit != nil {
			return *e.Exit, nil
		}
	}
}

func forward(c *net.UnixConn, sigc <-chan os.Signal, donec <-chan struct{}) {
	enc := json.NewEncoder(c)
	for {
		select {
		case s := <-sigc:
			if n, ok := s.(syscall.Signal); ok && enc.Encode(event{Signal: n}) != nil {
				return
			}
		case <-donec:
			return
		}
	}
}

func writeRequest(c *net.UnixConn, r Request, files []*os.File) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	b = append(b, '\n')
	var oob []byte
	if len(files) > 0 {
		var fds []int
		for _, f := range files {
			fds = append(fds, int(f.Fd()))
		}
		oob = unix.UnixRights(fds...)
	}
	// The descriptors go with the first byte; the rest follows as it fits.
	n, _, err := c.WriteMsgUnix(b[:1], oob, nil)
	if err != nil {
		return err
	}
	_, err = c.Write(b[n:])
	return err
}
