package load

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Churn changes objects that the control plane reads from a directory: a crowd that
// stands, objects that come and go, and a policy that takes effect and ends. Names
// and addresses are its own; nobody connects to them.
type Churn struct {
	Dir  string `json:"dir"`
	Name string `json:"name"` // of its files: another churn's are not touched

	// Crowd is written before anything else and stays when Stay is set.
	Workloads int  `json:"workloads,omitempty"`
	Services  int  `json:"services,omitempty"`
	Stay      bool `json:"stay,omitempty"`

	PerSec int `json:"perSec,omitempty"` // changes: pods and policies, in turn

	// Deny is the namespace whose connections are refused and allowed again, in turn.
	Deny  string        `json:"deny,omitempty"`
	Every time.Duration `json:"every,omitempty"`
}

// Churned is what it did.
type Churned struct {
	Changes int           `json:"changes"`
	Elapsed time.Duration `json:"elapsed"`
	Toggles []Toggle      `json:"toggles,omitempty"`
}

// Toggle is a change of the policy: from then on Allowed is declared.
type Toggle struct {
	At      time.Time `json:"at"`
	Allowed bool      `json:"allowed"`
}

// namespace has what a churn makes.
func (c Churn) namespace() string { return "crowd-" + c.Name }

// Run writes until ctx ends, takes away what does not stay, and tells what it did.
func (c Churn) Run(ctx context.Context, out io.Writer) error {
	if c.Dir == "" || c.Name == "" || c.PerSec < 0 || c.Deny != "" && c.Every <= 0 || c.Workloads > 1<<22 {
		return fmt.Errorf("churn %+v: want a directory, a name, and a time between changes of the policy", c)
	}
	if err := c.clear(); err != nil { // what stayed of an earlier one
		return err
	}
	if err := c.crowd(); err != nil {
		return err
	}
	if err := json.NewEncoder(out).Encode(Started{PID: os.Getpid()}); err != nil {
		return err
	}
	var did Churned
	var err error
	if c.PerSec > 0 || c.Deny != "" {
		did, err = c.change(ctx)
	}
	if !c.Stay {
		err = errors.Join(err, c.clear())
	}
	return errors.Join(err, json.NewEncoder(out).Encode(did))
}

// crowdLimit is how many documents are in a file: readers bound their size.
const crowdLimit = 1000

// crowd writes what stands, in a few files.
func (c Churn) crowd() error {
	var b strings.Builder
	n, files := 0, 0
	flush := func() error {
		if n == 0 {
			return nil
		}
		err := c.put(fmt.Sprintf("crowd-%d", files), b.String())
		files++
		n = 0
		b.Reset()
		return err
	}
	add := func(doc string) error {
		b.WriteString(doc)
		b.WriteString("---\n")
		if n++; n < crowdLimit {
			return nil
		}
		return flush()
	}
	if c.Workloads+c.Services+c.PerSec > 0 {
		if err := add(fmt.Sprintf(namespace, c.namespace())); err != nil {
			return err
		}
	}
	for i := range c.Services {
		if err := add(c.service(i)); err != nil {
			return err
		}
	}
	for i := range c.Workloads {
		if err := add(c.pod(i, fmt.Sprintf("w-%d", i), i%max(c.Services, 1))); err != nil {
			return err
		}
	}
	return flush()
}

// change makes changes at their times. One that is late is made at once: the rate
// holds as long as the disk does.
func (c Churn) change(ctx context.Context) (did Churned, err error) {
	const live = 50 // objects of a kind that exist at most
	began := time.Now()
	step := time.Hour
	if c.PerSec > 0 {
		step = time.Second / time.Duration(c.PerSec)
	}
	next, toggle := began, began.Add(c.Every)
	if c.Deny == "" {
		toggle = began.Add(1 << 50)
	}
	allowed := true
	for {
		at := next
		if toggle.Before(at) || c.PerSec == 0 {
			at = toggle
		}
		select {
		case <-time.After(time.Until(at)):
		case <-ctx.Done():
			did.Elapsed = time.Since(began)
			return did, nil
		}
		if at.Equal(toggle) {
			allowed = !allowed
			did.Toggles = append(did.Toggles, Toggle{time.Now(), allowed})
			toggle = toggle.Add(c.Every)
			err = c.set("toggle", !allowed, policy(c.Deny, "perf-toggle", ""))
		} else {
			// Even turns are pods, odd ones policies; the first half of a cycle makes
			// them, the second takes them away.
			k := did.Changes / 2 % (2 * live)
			name := fmt.Sprintf("c-%d", k%live)
			did.Changes++
			next = next.Add(step)
			if did.Changes%2 == 1 {
				err = c.set("pod-"+name, k < live, c.pod(1<<22+k%live, name, 0))
			} else {
				err = c.set("policy-"+name, k < live, policy(c.namespace(), name, "  selector: {matchLabels: {app: a-0}}\n"))
			}
		}
		if err != nil {
			return did, err
		}
	}
}

func (c Churn) set(name string, there bool, doc string) error {
	if there {
		return c.put(name, doc)
	}
	if err := os.Remove(c.file(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("take away object: %w", err)
	}
	return nil
}

// filePrefix is that of every file it writes.
const filePrefix = "perf-churn."

func (c Churn) file(name string) string {
	return filepath.Join(c.Dir, filePrefix+c.Name+"."+name+".yaml")
}

// put writes a file in one step: a reader never sees half of it.
func (c Churn) put(name, text string) error {
	path := c.file(name)
	temp := filepath.Join(c.Dir, "."+filepath.Base(path)+".part")
	if err := os.WriteFile(temp, []byte(text), 0o644); err != nil {
		return fmt.Errorf("write objects: %w", err)
	}
	return os.Rename(temp, path)
}

func (c Churn) clear() error {
	files, err := filepath.Glob(c.file("*"))
	for _, f := range files {
		err = errors.Join(err, os.Remove(f))
	}
	return err
}

const namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {istio.io/dataplane-mode: ambient}}\n"

// pod is one that runs on a node which is not in the lab, in the mesh.
func (c Churn) pod(i int, name string, service int) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, labels: {app: a-%d}, annotations: {ambient.istio.io/redirection: enabled}}
spec: {nodeName: elsewhere, serviceAccountName: sa-%d, containers: [{name: c, image: none}]}
status: {phase: Running, podIP: %[5]s, podIPs: [{ip: %[5]s}], conditions: [{type: Ready, status: "True"}]}
`, name, c.namespace(), service, service, crowdAddr(10, 128, i))
}

func (c Churn) service(i int) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: s-%d, namespace: %s}
spec: {clusterIP: %[3]s, clusterIPs: [%[3]s], selector: {app: a-%[1]d}, ports: [{name: http, port: 80, targetPort: 8080}]}
`, i, c.namespace(), crowdAddr(10, 112, i))
}

// crowdAddr is the address i of a part of 10.0.0.0/8 where the lab has nothing.
func crowdAddr(a, b byte, i int) netip.Addr {
	return netip.AddrFrom4([4]byte{a, b + byte(i>>16), byte(i >> 8), byte(i)})
}

func policy(ns, name, selector string) string {
	return fmt.Sprintf("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: %s, namespace: %s}\nspec:\n  action: DENY\n%s  rules: [{}]\n", name, ns, selector)
}
