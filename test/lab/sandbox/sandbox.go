// Package sandbox puts the lab into namespaces of its own: mounts, processes,
// network, host name and, without root's rights, a user namespace. When its first
// process ends, by whatever means, the kernel ends the others and takes back every
// mount and network namespace, so that nothing stays on the machine. What a kernel
// does not take back are cgroups: see Sweep.
//
//	up ── Start ──▶ pid 1 (Init: mounts, reaps) ──▶ the daemon
package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"

	"golang.org/x/sys/unix"
)

// Verbs of the program's own second runs.
const (
	InitVerb  = "sandbox-init"
	ProbeVerb = "sandbox-probe"
)

// RunDir and NetNSDir exist only inside the sandbox.
const (
	RunDir   = "/run/ambit-lab"
	NetNSDir = "/run/netns"
)

// Mode says which namespaces the machine allows.
type Mode struct {
	User   bool   // a user namespace is needed
	NoEBPF string // why the kernel takes no programs from the lab; "" where it does
}

func (m Mode) String() string {
	if m.User {
		return "user namespace"
	}
	return "root"
}

// attr is how a first process is started in mode m.
func (m Mode) attr() *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
	}
	if m.User {
		a.Cloneflags |= syscall.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		a.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	return a
}

// Start starts the program again as the first process of a new sandbox, for the lab
// of that name, with args after InitVerb and the name. Files are its descriptors 3
// and up; output is its standard output and error.
func Start(m Mode, name string, args, env []string, output *os.File, files ...*os.File) (*os.Process, error) {
	cmd := exec.Command("/proc/self/exe", append([]string{InitVerb, name}, args...)...)
	cmd.Args[0] = "ambit-lab"
	cmd.Env = env
	cmd.Stdout, cmd.Stderr = output, output
	cmd.ExtraFiles = files
	cmd.SysProcAttr = m.attr()
	cmd.Dir = "/"
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start sandbox (%s): %w", m, err)
	}
	return cmd.Process, nil
}

// Init is the first process of the lab of that name: it prepares the mounts, takes
// its place among the machine's cgroups, starts the program again with args and
// reaps until that ends. All descriptors below keep and above the standard ones are
// handed on.
func Init(name string, args []string, keep int) int {
	pid := hostPid()
	if err := prepare(func() error { return joinCgroup(name, pid) }); err != nil {
		fmt.Fprintln(os.Stderr, "prepare the lab's mounts:", err)
		return 1
	}
	files := []uintptr{0, 1, 2}
	for fd := 3; fd < 3+keep; fd++ {
		files = append(files, uintptr(fd))
	}
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		fmt.Fprintln(os.Stderr, "find the own program:", err)
		return 1
	}
	child, err := syscall.ForkExec(self, append([]string{"ambit-lab"}, args...), &syscall.ProcAttr{Dir: "/", Env: os.Environ(), Files: files})
	if err != nil {
		fmt.Fprintln(os.Stderr, "start the lab:", err)
		return 1
	}
	for {
		var ws syscall.WaitStatus
		got, err := syscall.Wait4(-1, &ws, 0, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return 1
		}
		if got == child {
			return ws.ExitStatus()
		}
	}
}

// prepare mounts what must not be the machine's. Between the mounts of /run and
// /proc, join is called; what it cannot do is done without.
func prepare(join func() error) error {
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := mountRun(); err != nil {
		return err
	}
	_ = join() // Detect has said what is missing
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	return nil
}

func mountRun() error {
	// Programs may live below /run (a user's runtime directory): keep what /run was.
	old, err := unix.Open("/run", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /run: %w", err)
	}
	defer unix.Close(old)
	resolv, _ := filepath.EvalSymlinks("/etc/resolv.conf") // may be missing
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	for _, dir := range []string{RunDir, NetNSDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	// A resolv.conf that pointed into the old /run needs something to point at, as
	// pods mount their own over it.
	if strings.HasPrefix(resolv, "/run/") {
		if err := errors.Join(os.MkdirAll(filepath.Dir(resolv), 0o755), os.WriteFile(resolv, nil, 0o644)); err != nil {
			return err
		}
	}
	return keepRun(old)
}

// keepRun makes the machine's /run/user and whatever holds the lab's programs
// visible again inside the private /run.
func keepRun(old int) error {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil || !strings.HasPrefix(self, "/run/") {
		return nil
	}
	dir := filepath.Dir(self)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	from := fmt.Sprintf("/proc/self/fd/%d/%s", old, strings.TrimPrefix(dir, "/run/"))
	return unix.Mount(from, dir, "none", unix.MS_BIND|unix.MS_REC, "")
}

// Need is something the lab uses and the machine refuses.
type Need struct{ What, Why, Help string }

// MissingError lists what is missing.
type MissingError struct{ Needs []Need }

func (e *MissingError) Error() string {
	var b strings.Builder
	b.WriteString("this machine does not allow what the lab needs:\n\n")
	t := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "  MISSING\tWHAT HAPPENED\tWHAT HELPS")
	for _, n := range e.Needs {
		fmt.Fprintf(t, "  %s\t%s\t%s\n", n.What, n.Why, n.Help)
	}
	_ = t.Flush() // into memory
	return strings.TrimRight(b.String(), "\n")
}

// Detect tries what the lab does, first with real namespaces, then in a user
// namespace, and returns the first mode in which all of it works.
func Detect() (Mode, error) {
	var last *MissingError
	for _, m := range []Mode{{User: false}, {User: true}} {
		f := probe(m)
		if len(f.Needs) == 0 {
			m.NoEBPF = f.NoEBPF
			return m, nil
		}
		// Where namespaces as such work, what else is missing tells more.
		if last == nil || f.Needs[0].What != namespaces {
			last = &MissingError{f.Needs}
		}
	}
	return Mode{}, last
}

// findings are what a probe prints.
type findings struct {
	Needs  []Need
	NoEBPF string
}

const namespaces = "network namespaces"

func probe(m Mode) findings {
	var out bytes.Buffer
	cmd := exec.Command("/proc/self/exe", ProbeVerb)
	cmd.Stdout = &out
	cmd.SysProcAttr = m.attr()
	if err := cmd.Run(); err != nil && out.Len() == 0 {
		return findings{Needs: []Need{{namespaces, err.Error(), helpNamespaces()}}}
	}
	var f findings
	if err := json.Unmarshal(out.Bytes(), &f); err != nil {
		return findings{Needs: []Need{{namespaces, "the probe ended early", helpNamespaces()}}}
	}
	return f
}

// helpNamespaces is the line for this machine.
func helpNamespaces() string {
	if read("/proc/sys/kernel/unprivileged_userns_clone") == "0" {
		return "sudo sysctl kernel.unprivileged_userns_clone=1"
	}
	if read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1" {
		return "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
	}
	if read("/proc/sys/user/max_user_namespaces") == "0" {
		return "sudo sysctl user.max_user_namespaces=10000"
	}
	if inContainer() || os.Getuid() == 0 {
		return "docker run --privileged ...   (or another container or VM that may make namespaces)"
	}
	return "run as root: sudo ambit-lab ..."
}

func inContainer() bool {
	for _, f := range []string{"/.dockerenv", "/run/.containerenv"} {
		if _, err := os.Stat(f); err == nil {
			return true
		}
	}
	return strings.Contains(read("/proc/1/cgroup"), "docker") || os.Getenv("container") != ""
}

func read(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
