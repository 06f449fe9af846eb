package app

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// Flow is a pod's live connection as `ambit-node flows -o json` prints it.
type Flow struct {
	Event       string     `json:"event,omitempty"` // --watch: open, close
	Pod         string     `json:"pod"`             // namespace/name
	Direction   string     `json:"direction"`       // inbound, outbound
	Source      string     `json:"source"`
	Destination string     `json:"destination"` // as the app asked for it
	Decision    string     `json:"decision"`
	Via         string     `json:"via,omitempty"` // where it goes instead
	State       string     `json:"state"`
	Since       *time.Time `json:"since,omitempty"` // none: nobody noted it
	Sent        uint64     `json:"bytesSent"`       // by the pod
	Received    uint64     `json:"bytesReceived"`
	Process     string     `json:"process,omitempty"` // the thread that opened it calls itself so
	PID         uint32     `json:"pid,omitempty"`
	Cgroup      uint64     `json:"cgroup,omitempty"`

	key flowKey
}

type flowKey struct {
	pod    string
	cookie uint64
}

// Decisions that take more than a pod's sockets to know.
const (
	preEnrolment = "pre-enrolment" // older than the pod's enrolment
	nodeProbe    = "probe"         // of the node's own processes
)

// flowLister finds the flows of the pods in the status directory.
type flowLister struct {
	status *agent.StatusDir
	reader *redirect.FlowReader
	node   map[netip.Addr]bool // the node's own addresses
	pod    string              // this one only; "": all
}

func openFlows(c Config, pod string) (*flowLister, error) {
	if _, err := os.Stat(c.StatusDir); err != nil {
		return nil, fmt.Errorf("read status directory (has the agent run, with the same --status-dir?): %w", err)
	}
	l := &flowLister{node: map[netip.Addr]bool{}, pod: pod}
	var err error
	if l.status, err = agent.OpenStatusDir(c.StatusDir); err != nil {
		return nil, err
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the node's addresses: %w", err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				l.node[ip.Unmap()] = true
			}
		}
	}
	if l.reader, err = redirect.OpenFlows(c.BPFFSDir); err != nil {
		return nil, err
	}
	return l, nil
}

var errNoSuchPod = errors.New("no such pod of this node is in the mesh")

// list returns flows in order. The error is about pods that could not be seen; the
// others' flows are returned all the same.
func (l *flowLister) list() ([]Flow, error) {
	pods, err := l.status.List()
	errs := []error{err}
	var out []Flow
	found := l.pod == ""
	for _, p := range pods {
		name := p.Namespace + "/" + p.Name
		if l.pod != "" && l.pod != name {
			continue
		}
		found = true
		flows, err := l.ofPod(p, name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // it ended meanwhile
			errs = append(errs, fmt.Errorf("list flows of pod %s: %w", name, err))
		}
		out = append(out, flows...)
	}
	if !found {
		errs = append(errs, fmt.Errorf("--pod %s: %w", l.pod, errNoSuchPod))
	}
	slices.SortFunc(out, func(a, b Flow) int {
		return cmp.Or(strings.Compare(a.Pod, b.Pod), strings.Compare(a.Direction, b.Direction),
			strings.Compare(a.Destination, b.Destination), strings.Compare(a.Source, b.Source))
	})
	return out, errors.Join(errs...)
}

func (l *flowLister) ofPod(p agent.Status, name string) ([]Flow, error) {
	if p.NetNS == "" {
		return nil, nil // not enrolled yet
	}
	ns, err := netns.Open(p.NetNS)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	flows, err := l.reader.List(ns)
	if err != nil {
		return nil, err
	}
	_, sockets, err := l.status.Older(p)
	older := map[uint64]bool{}
	for _, s := range sockets {
		older[s.Cookie] = true
	}
	var out []Flow
	for _, f := range flows {
		out = append(out, l.flow(name, f, older))
	}
	return out, err
}

func (l *flowLister) flow(pod string, f redirect.Flow, older map[uint64]bool) Flow {
	out := Flow{
		Pod: pod, Direction: "outbound", Source: f.Source.String(), Destination: f.Destination.String(),
		Decision: string(f.Decision), State: f.State.String(), Sent: f.Sent, Received: f.Received,
		Process: printable(f.Process), PID: f.PID, Cgroup: f.Cgroup, key: flowKey{pod, f.Cookie},
	}
	if f.Inbound {
		out.Direction = "inbound"
	}
	if f.Via.IsValid() {
		out.Via = f.Via.String()
	}
	if !f.Since.IsZero() {
		since := f.Since.UTC()
		out.Since = &since
	}
	switch {
	case f.Decision != redirect.Outside:
	case older[f.Cookie]:
		out.Decision = preEnrolment
	case f.Inbound && l.node[f.Source.Addr()]:
		out.Decision = nodeProbe
	}
	return out
}

// printable keeps what a process calls itself from being more than a word.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == ' ' || !strconv.IsPrint(r) {
			return '_'
		}
		return r
	}, s)
}

func flowsCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var c Config
	fs := newFlagSet("flows", stderr)
	commonFlags(fs, &c)
	format := fs.String("o", "", "output `format`: a table, or json: {\"flows\": [one each], \"more\": left out by --limit}; with --watch a flow a line, its \"event\" open or close")
	pod := fs.String("pod", "", "only this one: `NAMESPACE/NAME`")
	limit := fs.Int("limit", 1000, "print at most `N` flows; 0: all")
	watch := fs.Bool("watch", false, "print flows as they open and close, until interrupted; one that lives shorter than --interval may be missed")
	interval := fs.Duration("interval", time.Second, "with --watch: how often to look")
	if err := parse(fs, args); err != nil {
		return err
	}
	if *format != "" && *format != "json" && *format != "table" {
		return wrong(fs, "-o %s: want json or table", *format)
	}
	if *pod != "" && strings.Count(*pod, "/") != 1 {
		return wrong(fs, "--pod %s: want NAMESPACE/NAME", *pod)
	}
	if *interval < 10*time.Millisecond {
		return wrong(fs, "--interval %v: want 10ms or more", *interval)
	}
	l, err := openFlows(c, *pod)
	if err != nil {
		return err
	}
	defer l.reader.Close()
	if *watch {
		return l.watch(ctx, *interval, *format == "json", stdout)
	}
	flows, err := l.list()
	if errors.Is(err, errNoSuchPod) {
		return err
	}
	more := 0
	if *limit > 0 && len(flows) > *limit {
		more = len(flows) - *limit
		flows = flows[:*limit]
	}
	if *format == "json" {
		if flows == nil {
			flows = []Flow{}
		}
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		return errors.Join(err, enc.Encode(struct {
			Flows []Flow `json:"flows"`
			More  int    `json:"more,omitempty"` // left out by --limit
		}{flows, more}))
	}
	err = errors.Join(err, printFlows(stdout, flows, time.Now()))
	if more > 0 {
		fmt.Fprintf(stdout, "and %d more (--limit 0 prints all)\n", more)
	}
	return err
}

func printFlows(w io.Writer, flows []Flow, now time.Time) error {
	if len(flows) == 0 {
		_, err := fmt.Fprintln(w, "no pod in the mesh has a connection")
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "POD\tPROCESS\tSOURCE\tDESTINATION\tDECISION\tVIA\tSTATE\tAGE\tSENT\tRECEIVED")
	for _, f := range flows {
		fmt.Fprintln(tw, strings.Join(f.columns(now), "\t"))
	}
	return tw.Flush()
}

func (f Flow) columns(now time.Time) []string {
	process, age := "-", "-"
	if f.PID != 0 {
		process = fmt.Sprintf("%s[%d]", f.Process, f.PID)
	}
	if f.Since != nil {
		age = now.Sub(*f.Since).Truncate(time.Second).String()
	}
	via := f.Via
	switch {
	case via == "":
		via = "-"
	case f.Decision == string(redirect.Captured):
		via = "ztunnel" // at an address that means nothing to people
	}
	return []string{f.Pod, process, f.Source, f.Destination, f.Decision, via, f.State, age,
		strconv.FormatUint(f.Sent, 10), strconv.FormatUint(f.Received, 10)}
}

// watch prints what has opened and closed since the last look.
func (l *flowLister) watch(ctx context.Context, every time.Duration, asJSON bool, w io.Writer) error {
	enc := json.NewEncoder(w)
	print := func(event string, f Flow) error {
		if asJSON {
			f.Event = event
			return enc.Encode(f)
		}
		_, err := fmt.Fprintln(w, strings.Join(append([]string{time.Now().Format(time.TimeOnly), event}, f.columns(time.Now())...), "  "))
		return err
	}
	open := map[flowKey]Flow{}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		flows, err := l.list()
		if err != nil && !errors.Is(err, errNoSuchPod) { // it may come yet
			return err
		}
		now := make(map[flowKey]Flow, len(flows))
		for _, f := range flows {
			now[f.key] = f
			if _, ok := open[f.key]; ok {
				continue
			}
			if err := print("open", f); err != nil {
				return err
			}
		}
		for _, key := range slices.SortedFunc(maps.Keys(open), func(a, b flowKey) int { return cmp.Compare(a.cookie, b.cookie) }) {
			if _, ok := now[key]; ok {
				continue
			}
			if err := print("close", open[key]); err != nil {
				return err
			}
		}
		open = now
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
