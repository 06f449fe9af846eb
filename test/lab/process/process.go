// Package process starts programs inside the lab's namespaces: a pod's containers,
// commands run by `exec`, and the mesh's daemons on their nodes.
//
// A program of the lab starts itself again (`ambit-lab` with the argument Verb);
// that second run enters the network namespace, prepares mounts and host name, and
// becomes the wanted program, so that nothing of the lab stays in between.
package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Verb is the first argument of the run that enters the namespaces. The main of
// every program that starts processes here calls Enter when it sees it.
const Verb = "enter-namespaces"

// specEnv carries the Spec to the second run.
const specEnv = "AMBIT_LAB_SPEC"

// Spec describes a process.
type Spec struct {
	Argv    []string
	Env     []string
	Dir     string  // working directory, default /
	NetNS   string  // path of the network namespace, "" stays
	Cgroup  string  // directory of the cgroup, made if missing; "" stays
	Once    bool    // the cgroup is this process's alone and goes with it
	Private bool    // own mount and host name namespaces
	Host    string  // host name, with Private
	Mounts  []Mount // with Private
	Scratch string  // a directory of the lab's own, for mount points that do not exist
}

// Mount binds Source at Target.
type Mount struct {
	Source, Target string
	ReadOnly       bool
}

// Process is a running process and, after Done, how it ended.
type Process struct {
	cmd   *exec.Cmd
	donec chan struct{}
	once  string // cgroup that goes with the process

	mu   sync.Mutex
	code int       // guarded by mu
	end  time.Time // guarded by mu
}

// Start starts a process in a session of its own. The caller may close the files
// afterwards; a nil one is /dev/null.
func Start(s Spec, stdin, stdout, stderr *os.File) (*Process, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe", Verb)
	cmd.Args[0] = s.Argv[0]
	cmd.Env = []string{specEnv + "=" + string(b)}
	// Interface values that hold a nil *os.File would not be nil.
	if stdin != nil {
		cmd.Stdin = stdin
	}
	if stdout != nil {
		cmd.Stdout = stdout
	}
	if stderr != nil {
		cmd.Stderr = stderr
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if s.Private {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS
	}
	if s.Cgroup != "" {
		// Born there: the kernel's programs never see it anywhere else.
		dir, err := openCgroup(s.Cgroup)
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", s.Argv[0], err)
		}
		defer dir.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", s.Argv[0], err)
	}
	p := &Process{cmd: cmd, donec: make(chan struct{})}
	if s.Once {
		p.once = s.Cgroup
	}
	go p.wait()
	return p, nil
}

func openCgroup(path string) (*os.File, error) {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	return os.Open(path)
}

// RemoveCgroup removes a cgroup and those below it, as far as they are empty.
func RemoveCgroup(dir string) {
	if dir == "" {
		return
	}
	entries, _ := os.ReadDir(dir) // one that is gone has none
	for _, e := range entries {
		if e.IsDir() {
			RemoveCgroup(filepath.Join(dir, e.Name()))
		}
	}
	_ = syscall.Rmdir(dir) // one with processes stays
}

// wait reaps the process; it owns cmd.Wait and closes donec.
func (p *Process) wait() {
	_ = p.cmd.Wait() // the state below says how it ended
	p.mu.Lock()
	p.code, p.end = ExitCode(p.cmd.ProcessState), time.Now()
	p.mu.Unlock()
	RemoveCgroup(p.once)
	close(p.donec)
}

// ExitCode is a process's exit code as a shell reports it: 128+signal when killed.
func ExitCode(st *os.ProcessState) int {
	if st == nil {
		return -1
	}
	if ws, ok := st.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return st.ExitCode()
}

// Pid returns the process id inside the lab.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.donec }

// Exit returns the exit code and the time of a process that is done.
func (p *Process) Exit() (int, time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.code, p.end
}

// Signal sends a signal to the process and to all it started in its session.
func (p *Process) Signal(sig syscall.Signal) error {
	select {
	case <-p.donec:
		return os.ErrProcessDone
	default:
	}
	err := syscall.Kill(-p.Pid(), sig)
	if errors.Is(err, syscall.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

// Stop asks the process to end and kills it after the grace period. It returns
// when the process is gone.
func (p *Process) Stop(grace time.Duration) {
	_ = p.Signal(syscall.SIGTERM) // it may have ended by itself
	select {
	case <-p.donec:
	case <-time.After(grace):
	}
	// What the process left running in its session goes too.
	_ = syscall.Kill(-p.Pid(), syscall.SIGKILL)
	<-p.donec
}

// Enter is the second run: it becomes the program of the Spec, or says why not
// and returns the exit code a shell would.
func Enter() int {
	var s Spec
	if err := json.Unmarshal([]byte(os.Getenv(specEnv)), &s); err != nil || len(s.Argv) == 0 {
		fmt.Fprintln(os.Stderr, "lab: this verb is used by the lab itself")
		return 125
	}
	if err := s.enter(); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
			return 127
		}
		return 126
	}
	return 0
}

func (s Spec) enter() error {
	// exec keeps the namespaces of the thread that calls it.
	runtime.LockOSThread()
	if s.NetNS != "" {
		fd, err := unix.Open(s.NetNS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open network namespace: %w", err)
		}
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", s.NetNS, err)
		}
	}
	if s.Private {
		for _, m := range s.Mounts {
			if err := m.mount(s.Scratch); err != nil {
				return err
			}
		}
		if s.Host != "" {
			if err := unix.Sethostname([]byte(s.Host)); err != nil {
				return fmt.Errorf("set host name: %w", err)
			}
		}
	}
	dir := s.Dir
	if dir == "" {
		dir = "/"
	}
	if err := os.Chdir(dir); err != nil {
		return fmt.Errorf("change directory: %w", err)
	}
	for _, kv := range s.Env {
		if path, ok := strings.CutPrefix(kv, "PATH="); ok {
			if err := os.Setenv("PATH", path); err != nil {
				return err
			}
		}
	}
	path, err := exec.LookPath(s.Argv[0])
	if err != nil {
		return err
	}
	return fmt.Errorf("run %s: %w", path, syscall.Exec(path, s.Argv, s.Env))
}

// mount binds one path. Where the mount point does not exist on the machine, its
// nearest parent is overlaid with a copy in scratch that has it, so that nothing
// is created on the machine.
func (m Mount) mount(scratch string) error {
	target, err := m.target(scratch)
	if err != nil {
		return fmt.Errorf("mount point %s: %w", m.Target, err)
	}
	if err := unix.Mount(m.Source, target, "none", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", m.Target, err)
	}
	if m.ReadOnly {
		// The remount keeps flags that a user namespace may not clear; where that is
		// refused the volume stays writable, which only a container could notice.
		_ = unix.Mount("none", target, "none", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}
	return nil
}

func (m Mount) target(scratch string) (string, error) {
	if real, err := filepath.EvalSymlinks(m.Target); err == nil {
		return real, nil
	}
	parent := filepath.Dir(filepath.Clean(m.Target))
	for {
		if st, err := os.Stat(parent); err == nil && st.IsDir() {
			break
		}
		parent = filepath.Dir(parent)
	}
	if parent == "/" {
		return "", errors.New("a directory directly below / must exist on the machine; mount below /tmp, /mnt or /var")
	}
	base, err := os.MkdirTemp(scratch, "overlay-")
	if err != nil {
		return "", err
	}
	upper, work := filepath.Join(base, "upper"), filepath.Join(base, "work")
	rel, err := filepath.Rel(parent, m.Target)
	if err != nil {
		return "", err
	}
	point := filepath.Join(upper, rel)
	if err := errors.Join(os.MkdirAll(work, 0o755), os.MkdirAll(filepath.Dir(point), 0o755), like(m.Source, point)); err != nil {
		return "", err
	}
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", parent, upper, work)
	if err := unix.Mount("overlay", parent, "overlay", 0, opts); err != nil {
		return "", fmt.Errorf("overlay %s: %w", parent, err)
	}
	return m.Target, nil
}

// like makes an empty file or directory at path, as source is one.
func like(source, path string) error {
	st, err := os.Stat(source)
	if err != nil {
		return err
	}
	if st.IsDir() {
		return os.MkdirAll(path, 0o755)
	}
	return os.WriteFile(path, nil, 0o644)
}
