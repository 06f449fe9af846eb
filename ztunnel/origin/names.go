package origin

import (
	"context"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxKnown bounds what is remembered of processes, and of cgroups between
	// walks. All is forgotten when there is more: the living are soon known again.
	// Arbitrary.
	maxKnown = 4096
	// queued connections wait for Run; with more of them some have no names.
	queued = 256
	// processAge is how long a process is believed to be what it was: pids are
	// used again.
	processAge = time.Minute
	// walkPause is the least time between walks of the cgroup hierarchy, maxDirs
	// how much of it is looked at, maxDepth how deep: containers are six below
	// the root. Arbitrary.
	walkPause = 5 * time.Second
	maxDirs   = 20_000
	maxDepth  = 12
)

// initPIDNamespace is the inode number of the first PID namespace:
// PROC_PID_INIT_INO in linux/proc_ns.h.
const initPIDNamespace = 0xeffffffc

// Config of Names.
type Config struct {
	Proc    string   // default /proc
	Cgroups []string // where the node's cgroup2 hierarchy may be; default the usual places
}

// Names finds the names that belong to origins.
type Names struct {
	cfg    Config
	queue  chan Origin
	hasPID bool   // /proc shows the processes that the kernel names
	root   string // of the cgroup hierarchy; "" if there is none
	walked time.Time

	mu         sync.Mutex
	processes  map[process]program
	containers map[uint64]string // by cgroup; "" is none. Found by a walk
}

// process is one, as far as its number is: see processAge.
type process struct {
	pid    uint32
	cgroup uint64
	comm   [16]byte // another one after exec(2)
}

type program struct {
	name, container string
	at              time.Time
}

// New looks what there is to be read. Run reads it.
func New(cfg Config) *Names {
	if cfg.Proc == "" {
		cfg.Proc = "/proc"
	}
	if cfg.Cgroups == nil {
		cfg.Cgroups = []string{"/host/sys/fs/cgroup", "/sys/fs/cgroup", "/sys/fs/cgroup/unified"}
	}
	n := &Names{cfg: cfg, queue: make(chan Origin, queued), processes: map[process]program{}, containers: map[uint64]string{}}
	var st unix.Stat_t
	n.hasPID = unix.Stat(filepath.Join(cfg.Proc, "self/ns/pid"), &st) == nil && st.Ino == initPIDNamespace
	for _, dir := range cfg.Cgroups {
		var sfs unix.Statfs_t
		if unix.Statfs(dir, &sfs) == nil && sfs.Type == unix.CGROUP2_SUPER_MAGIC {
			n.root = dir
			break
		}
	}
	return n
}

// Note says that an origin will be asked for. It never waits: when many are
// noted at once, some stay without names.
func (n *Names) Note(o Origin) {
	if o == (Origin{}) || !n.hasPID && n.root == "" {
		return
	}
	if p, c := n.known(o); p && c {
		return
	}
	select {
	case n.queue <- o:
	default:
	}
}

func (n *Names) known(o Origin) (program, container bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p, ok := n.processes[key(o)]
	_, container = n.containers[o.Cgroup]
	container = container || n.root == ""
	return !n.hasPID || ok && time.Since(p.at) < processAge, container
}

func key(o Origin) process { return process{o.PID, o.Cgroup, o.Comm} }

// Of returns what is known by now: the base name of the executable and the
// container's id, or "".
func (n *Names) Of(o Origin) (executable, container string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := n.processes[key(o)]
	if c, ok := n.containers[o.Cgroup]; ok {
		return p.name, c
	}
	return p.name, p.container
}

// Run reads what Note asked for.
func (n *Names) Run(ctx context.Context) error {
	for {
		select {
		case o := <-n.queue:
			n.learn(o)
		case <-ctx.Done():
			return nil
		}
	}
}

func (n *Names) learn(o Origin) {
	process, container := n.known(o)
	if !process {
		p := program{n.executable(o.PID), n.containerOf(o.PID), time.Now()}
		n.mu.Lock()
		if len(n.processes) >= maxKnown {
			clear(n.processes)
		}
		n.processes[key(o)] = p
		n.mu.Unlock()
	}
	if !container {
		n.walk(o.Cgroup)
	}
}

// executable is what the process runs; it takes CAP_SYS_PTRACE to see that of
// another user's.
func (n *Names) executable(pid uint32) string {
	if !n.hasPID {
		return ""
	}
	exe, err := os.Readlink(n.proc(pid, "exe"))
	if err != nil {
		return "" // it has ended, or is none of ours to see
	}
	return Printable(path.Base(strings.TrimSuffix(exe, " (deleted)")))
}

func (n *Names) proc(pid uint32, file string) string {
	return filepath.Join(n.cfg.Proc, strconv.FormatUint(uint64(pid), 10), file)
}

// containerOf is what the process's cgroup says, cgroups(7).
func (n *Names) containerOf(pid uint32) string {
	if !n.hasPID {
		return ""
	}
	b, err := os.ReadFile(n.proc(pid, "cgroup"))
	if err != nil {
		return "" // it has ended
	}
	for line := range strings.Lines(string(b)) {
		if p, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return containerID(p)
		}
	}
	return ""
}

// walk learns all containers of the node, since a cgroup's number does not lead
// to its directory without a capability that the proxy has no other use for
// (open_by_handle_at(2)).
func (n *Names) walk(wanted uint64) {
	if n.root == "" || time.Since(n.walked) < walkPause {
		return
	}
	found := map[uint64]string{wanted: ""} // also if it is nowhere: numbers are not used again
	left := maxDirs
	walk(n.root, "/", maxDepth, &left, found)
	n.walked = time.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.containers)+len(found) > maxKnown {
		clear(n.containers)
	}
	maps.Copy(n.containers, found) // no more than maxDirs
}

func walk(dir, name string, depth int, left *int, found map[uint64]string) {
	if *left--; *left < 0 {
		return
	}
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return // gone meanwhile
	}
	if id := containerID(name); id != "" {
		found[st.Ino] = id
	}
	if depth == 0 {
		return
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if e.Type()&fs.ModeDir != 0 {
			walk(filepath.Join(dir, e.Name()), path.Join(name, e.Name()), depth-1, left, found)
		}
	}
}

// containerID finds the container in a path that a kubelet's container runtime
// made, with either cgroup driver: .../pod<uid>/<id> or
// .../...-pod<uid>.slice/cri-containerd-<id>.scope. What runs its own containers
// or services in a container has further directories below.
func containerID(cgroup string) string {
	inPod := false
	for name := range strings.SplitSeq(cgroup, "/") {
		if inPod {
			if id := idOf(name); id != "" {
				return id
			}
		}
		name = strings.TrimSuffix(name, ".slice")
		inPod = inPod || strings.HasPrefix(name, "pod") || strings.HasPrefix(name, "kubepods") && strings.Contains(name, "-pod")
	}
	return ""
}

// shownID is how much of an id is shown: what the tools of container runtimes
// show, and take.
const shownID = 13

func idOf(name string) string {
	name = strings.TrimSuffix(name, ".scope")
	if i := strings.LastIndexAny(name, "-:"); i >= 0 { // cri-containerd-<id>, crio-<id>, <slice>:cri-containerd:<id>
		name = name[i+1:]
	}
	if len(name) != 64 || strings.Trim(name, "0123456789abcdef") != "" {
		return ""
	}
	return name[:shownID]
}
