package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ambit-mesh/ambit/test/lab/process"
	"github.com/ambit-mesh/ambit/test/lab/sandbox"
)

// story tells the demo: what is run, what is seen, and whether it is as claimed.
type story struct {
	stopc    <-chan struct{} // closed when the demo is interrupted or takes too long
	name     string
	out      io.Writer
	began    time.Time
	chapters int
	passed   int
	failed   []string // each claim that did not hold, with its chapter
	fatal    bool     // what comes next makes no sense any more
}

func (s *story) line(format string, args ...any) { fmt.Fprintf(s.out, format+"\n", args...) }

func (s *story) chapter(title string) {
	s.chapters++
	s.line("\n%d. %s", s.chapters, title)
}

// check counts a claim.
func (s *story) check(ok bool, format string, args ...any) {
	mark := "✓"
	if ok {
		s.passed++
	} else {
		s.failed = append(s.failed, fmt.Sprintf("chapter %d: "+format, append([]any{s.chapters}, args...)...))
		mark = "✗ NOT SO:"
	}
	s.line("   %s %s", mark, fmt.Sprintf(format, args...))
}

// end prints the sum and returns the exit status.
func (s *story) end() int {
	s.line("\nthe lab is gone and left nothing behind; this took %s", time.Since(s.began).Round(time.Second))
	for _, claim := range s.failed { // once more: the end of a long output is what is read
		s.line("not so in %s", claim)
	}
	s.line("demo: %d checks passed, %d failed", s.passed, len(s.failed))
	if len(s.failed) > 0 || s.passed == 0 {
		return 1
	}
	return 0
}

func (s *story) prerequisites(redirect string) bool {
	for _, tool := range []struct{ name, pkg string }{{"ip", "iproute2"}, {"nft", "nftables"}, {"curl", "curl"}} {
		path, err := exec.LookPath(tool.name)
		if err != nil {
			path, err = exec.LookPath("/usr/sbin/" + tool.name)
		}
		if err != nil {
			s.check(false, "%s is needed: sudo apt-get install %s", tool.name, tool.pkg)
			return false
		}
		s.line("   %s: %s", tool.name, path)
	}
	mode, err := sandbox.Detect()
	if err != nil {
		s.check(false, "%v", err)
		return false
	}
	s.check(true, "namespaces, nftables and transparent sockets work here (%s); nothing outside the lab's own namespaces is touched", mode)
	switch {
	case redirect == "nftables":
	case mode.NoEBPF == "":
		s.line("   eBPF: the kernel takes the mesh's programs")
	default:
		s.line("   eBPF: not available, so nftables redirects: %s", mode.NoEBPF)
	}
	return true
}

// result is how a command ended.
type result struct {
	out, err string
	code     int
}

// command is this program with a command for the demo's lab.
func (s *story) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{"--name", s.name}, args...)...)
	cmd.Args[0] = "ambit-lab"
	return cmd
}

// quiet runs a command without a word.
func (s *story) quiet(args ...string) result {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := s.command(ctx, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	_ = cmd.Run() // the exit code below tells
	return result{out.String(), errs.String(), process.ExitCode(cmd.ProcessState)}
}

// run shows a command and what came back.
func (s *story) run(args ...string) result {
	s.line("$ ambit-lab %s", shown(args))
	r := s.quiet(args...)
	if text := strings.TrimSpace(r.out + r.err); text != "" {
		s.line("   %s", short(strings.Join(strings.Fields(text), " ")))
	}
	return r
}

// must runs a command without which the rest makes no sense.
func (s *story) must(args ...string) {
	if s.fatal {
		return
	}
	s.line("$ ambit-lab %s", shown(args))
	if r := s.quiet(args...); r.code != 0 {
		s.check(false, "ambit-lab %s: exit status %d: %s", shown(args), r.code, strings.TrimSpace(r.err))
		s.fatal = true
	}
}

// apply applies a text and says in words what it is.
func (s *story) apply(yaml, what string) {
	s.line("$ ambit-lab apply -f -      # %s", what)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := s.command(ctx, "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(yaml)
	if out, err := cmd.CombinedOutput(); err != nil {
		s.check(false, "apply: %v: %s", err, strings.TrimSpace(string(out)))
		s.fatal = true
	} else if strings.Contains(string(out), "warning") {
		s.line("   %s", strings.TrimSpace(string(out)))
	}
}

func shown(args []string) string {
	var words []string
	for _, a := range args {
		if strings.ContainsAny(a, " %{}*'") || a == "" {
			a = "'" + a + "'"
		}
		words = append(words, a)
	}
	return strings.Join(words, " ")
}

func short(s string) string {
	if r := []rune(s); len(r) > 300 {
		return string(r[:300]) + " ..."
	}
	return s
}

// patience is how long the story waits for what must come, on a machine that has
// other things to do; what is there is not waited for.
const patience = 90 * time.Second

// until tries until it is so, and shows what was seen last. A first miss is
// normal: changes need some milliseconds to reach the nodes.
func (s *story) until(limit time.Duration, try func() (ok bool, seen string)) bool {
	deadline := time.Now().Add(limit)
	told := time.Now()
	for {
		ok, seen := try()
		if ok || time.Now().After(deadline) || s.stopped() {
			if seen != "" {
				s.line("   %s", short(seen))
			}
			return ok
		}
		if time.Since(told) > 3*time.Second {
			told = time.Now()
			s.line("   ... waiting, %s left", time.Until(deadline).Round(time.Second))
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-s.stopc:
		}
	}
}

func (s *story) stopped() bool {
	select {
	case <-s.stopc:
		return true
	default:
		return false
	}
}

// works makes one call that has to succeed, with the marker in it.
func (s *story) works(pod string) bool { return s.worksWithin(pod, "30") }

func (s *story) worksWithin(pod, seconds string) bool {
	r := s.quiet("exec", pod, "--", "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", seconds, "-d", marker, "http://echo/")
	return r.out == "200"
}

// logged is how much a component has logged.
func (s *story) logged(component string) int { return len(s.quiet("logs", component).out) }

// newLine returns the last line, logged after mark, that has all the words. A log
// is written a moment after the connection it tells of.
func (s *story) newLine(mark int, component string, words ...string) string {
	found := ""
	deadline := time.Now().Add(700 * time.Millisecond)
	for found == "" && time.Now().Before(deadline) {
		text := s.quiet("logs", component).out
		for line := range strings.SplitSeq(text[min(mark, len(text)):], "\n") {
			all := true
			for _, w := range words {
				all = all && strings.Contains(line, w)
			}
			if all {
				found = line
			}
		}
	}
	return found
}

func (s *story) marks() map[string]int {
	return map[string]int{"ztunnel@node-1": s.logged("ztunnel@node-1"), "ztunnel@node-2": s.logged("ztunnel@node-2")}
}

func (s *story) newLineAnywhere(marks map[string]int, words ...string) string {
	for component, mark := range marks {
		if l := s.newLine(mark, component, words...); l != "" {
			return l
		}
	}
	return ""
}

// field reads key="value" or key=value of a log line.
func field(line, key string) string {
	_, rest, ok := strings.Cut(line, " "+key+"=")
	if !ok {
		if _, rest, ok = strings.Cut(line, "\t"+key+"="); !ok {
			return ""
		}
	}
	if strings.HasPrefix(rest, `"`) {
		return between(rest, `"`, `"`)
	}
	v, _, _ := strings.Cut(rest, " ")
	return v
}

func between(s, from, to string) string {
	_, rest, _ := strings.Cut(s, from)
	v, _, _ := strings.Cut(rest, to)
	return v
}

func identityOf(sa string) string { return "spiffe://cluster.local/ns/default/sa/" + sa }

// accessLine keeps the keys of an access log line that matter here.
func accessLine(line string) string {
	var b strings.Builder
	for _, k := range []string{"src.addr", "src.identity", "dst.addr", "dst.hbone_addr", "dst.identity", "direction"} {
		if v := field(line, k); v != "" {
			fmt.Fprintf(&b, "%s=%s ", k, v)
		}
	}
	return b.String()
}

// serial is the serial number of a service account's certificate on a node.
func (s *story) serial(node, sa string) string {
	var dump struct {
		Certificates []struct {
			Identity  string `json:"identity"`
			CertChain []struct {
				SerialNumber string `json:"serialNumber"`
			} `json:"certChain"`
		} `json:"certificates"`
	}
	out := s.quiet("exec", node, "--", "curl", "-sS", "http://127.0.0.1:15000/config_dump").out
	if json.Unmarshal([]byte(out), &dump) != nil {
		return ""
	}
	for _, c := range dump.Certificates {
		if c.Identity == identityOf(sa) && len(c.CertChain) > 0 {
			return c.CertChain[0].SerialNumber
		}
	}
	return ""
}

// sniffed is what a capture saw.
type sniffed struct {
	Packets, Marker, TLS, HBONE int
}

type sniffer struct{ b *background }

// sniff captures on an interface of a pod or node until it is stopped.
func (s *story) sniff(where, link string) sniffer {
	b := s.background("exec", where, "--", "ambit-sample", "sniff", link, marker)
	deadline := time.Now().Add(patience)
	for b.lines() == 0 && time.Now().Before(deadline) && !b.wait(10*time.Millisecond) {
	}
	return sniffer{b}
}

func (n sniffer) stop() sniffed {
	n.b.stop()
	var seen sniffed
	_ = json.Unmarshal([]byte(n.b.last()), &seen) // nothing seen fails the checks
	return seen
}

// calling makes calls of a pod one after the other, each over a connection of its
// own, until it is stopped; calls reads what came of them. A status goes to standard
// error because there curl writes it at once, and to a pipe a thousand at a time.
func (s *story) calling(pod, url string) *background {
	return s.background("exec", pod, "--", "curl", "-sS", "-o", "/dev/null", "-H", "Connection: close", "-w", "%{stderr}%{http_code}\n", "--max-time", "30", url+"[1-1000000]")
}

// background is a command that runs beside the story.
type background struct {
	cmd   *exec.Cmd
	donec chan struct{}

	mu  sync.Mutex
	out bytes.Buffer // guarded by mu
}

// Write collects the output.
func (b *background) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.out.Write(p)
}

func (s *story) background(args ...string) *background {
	b := &background{cmd: s.command(context.Background(), args...), donec: make(chan struct{})}
	b.cmd.Stdout, b.cmd.Stderr = b, b
	if err := b.cmd.Start(); err != nil {
		_, _ = b.Write([]byte(err.Error())) // never fails
		close(b.donec)
		return b
	}
	go func() {
		_ = b.cmd.Wait() // code tells
		close(b.donec)
	}()
	return b
}

func (b *background) text() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.TrimSpace(b.out.String())
}

// calls counts the calls of a curl that writes each one's status on a line of its
// own, and those among them that were not answered with 200. What curl says of a
// failed call is a line too, and no call; nor is the last one, which our interrupt
// ended.
func (b *background) calls() (all, failed int) {
	var codes []string
	for line := range strings.Lines(b.text()) {
		if code := strings.TrimSpace(line); len(code) == 3 && strings.Trim(code, "0123456789") == "" {
			codes = append(codes, code)
		}
	}
	for _, code := range codes[:max(len(codes)-1, 0)] {
		all++
		if code != "200" {
			failed++
		}
	}
	return all, failed
}

func (b *background) lines() int {
	if t := b.text(); t != "" {
		return strings.Count(t, "\n") + 1
	}
	return 0
}

func (b *background) last() string {
	t := b.text()
	return t[strings.LastIndexByte(t, '\n')+1:]
}

func (b *background) wait(d time.Duration) bool {
	select {
	case <-b.donec:
		return true
	case <-time.After(d):
		return false
	}
}

func (b *background) code() int { return process.ExitCode(b.cmd.ProcessState) }

// stop ends the command as Ctrl-C would.
func (b *background) stop() {
	if b.cmd.Process == nil {
		return
	}
	if err := b.cmd.Process.Signal(syscall.SIGINT); errors.Is(err, os.ErrProcessDone) {
		return
	}
	if !b.wait(patience) { // what it says last is what it was for
		_ = b.cmd.Process.Kill() // it did not listen
		<-b.donec
	}
}
