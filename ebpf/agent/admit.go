package agent

import (
	"cmp"
	"context"
	"fmt"

	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// admission is what the agent knows from container runtimes: where pods are attached
// that start now, or did since the node was booted. That is earlier than any source
// knows their addresses, and without it no source may know their namespaces at all.
//
//	runtime ─ ADD ─▶ Admit ─▶ attachment ─▶ attachLoop ─▶ worker ─▶ enabled ─▶ pod starts
//
// Guarded by Agent.mu but for wakec.
type admission struct {
	wakec chan struct{} // cap 1: attachLoop looks at dirty

	pods     map[string]Pod // by UID, as the source listed them last
	attached map[string]attach.Attachment
	left     map[string]string // namespaces that the runtime has given up
	dirty    map[string]bool
	// The last three are by what the runtime calls the pod.

	changed chan struct{} // closed and replaced when Admit has to look again
}

func newAdmission() admission {
	return admission{
		wakec: make(chan struct{}, 1), pods: map[string]Pod{}, attached: map[string]attach.Attachment{},
		left: map[string]string{}, dirty: map[string]bool{}, changed: make(chan struct{}),
	}
}

// runtimeUID is what the container runtime calls the pod.
func (p Pod) runtimeUID() string { return cmp.Or(p.RuntimeUID, p.UID) }

const noAddress = "the pod has no address yet (status.podIPs)"

// attachedLocked completes a pod by what the runtime says, which is newer than any
// status. It returns false for a pod whose namespace was given up: it is as good as
// gone, and what its last connections need goes with the namespace.
func (a *Agent) attachedLocked(p Pod) (Pod, bool) {
	key := p.runtimeUID()
	if path, left := a.admission.left[key]; left && (p.NetNS == "" || p.NetNS == path) {
		return p, false
	}
	if at, ok := a.admission.attached[key]; ok {
		p.NetNS = at.NetNS
		if len(at.Addrs) > 0 {
			p.Addrs = at.Addrs
		}
	}
	if p.Enrolled && len(p.Addrs) == 0 {
		p.Enrolled, p.Why = false, noAddress
	}
	return p, true
}

// listedLocked takes over what the source lists.
func (a *Agent) listedLocked(pods []Pod) {
	ad := &a.admission
	ad.pods = make(map[string]Pod, len(pods))
	known := make(map[string]bool, len(pods))
	for _, p := range pods {
		ad.pods[p.UID] = p
		known[p.runtimeUID()] = true
	}
	for uid := range ad.left {
		if !known[uid] {
			delete(ad.left, uid)
		}
	}
}

// notifyLocked has every Admit look again.
func (a *Agent) notifyLocked() {
	close(a.admission.changed)
	a.admission.changed = make(chan struct{})
}

func (a *Agent) notify() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.notifyLocked()
}

// loadAttachments brings back what an agent before this one was told.
func (a *Agent) loadAttachments() {
	if a.cfg.Attachments == nil {
		return
	}
	all, err := a.cfg.Attachments.List()
	if err != nil {
		a.cfg.Logger.Warn("attachments of pods cannot be read", "err", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, at := range all {
		a.admission.attached[at.UID] = at
	}
}

// attachLoop gives workers what runtimes said, under the agent's own lifetime.
func (a *Agent) attachLoop(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.admission.wakec:
		}
		a.mu.Lock()
		if a.synced { // or update does it
			for _, p := range a.admission.pods {
				if a.admission.dirty[p.runtimeUID()] {
					a.wantLocked(ctx, p)
				}
			}
			clear(a.admission.dirty)
			a.notifyLocked()
		}
		a.mu.Unlock()
	}
}

// attach takes over an attachment. A later one of the same pod replaces it: its
// sandbox was made anew.
func (a *Agent) attach(at attach.Attachment) {
	if s := a.cfg.Attachments; s != nil {
		if err := s.Put(at); err != nil {
			a.cfg.Logger.Warn("attachment is not kept: another agent will not find the pod's namespace", "pod", at.Pod(), "err", err)
		}
	}
	a.mu.Lock()
	ad := &a.admission
	ad.attached[at.UID] = at
	delete(ad.left, at.UID)
	ad.dirty[at.UID] = true
	a.mu.Unlock()
	a.wakeAttachLoop()
}

func (a *Agent) wakeAttachLoop() {
	select {
	case a.admission.wakec <- struct{}{}:
	default: // it will look anyway
	}
}

// Admit returns when the pod may start: at once if it is not to be in the mesh, and
// otherwise when its connections are captured and the proxy has acknowledged it. If
// ctx ends before, the error says what is missing. Before the source has listed the
// pods nothing is decided, and at once, so that the plugin can decide by facts: a
// source may take long after a reboot.
func (a *Agent) Admit(ctx context.Context, at attach.Attachment) (inMesh bool, why string, err error) {
	if at.Inode, err = a.inode(at); err != nil {
		return false, "", err
	}
	announced := false
	for {
		if at.UID == "" {
			at.UID = a.uidOf(at)
		}
		if at.UID != "" && !announced {
			announced = true
			a.attach(at)
		}
		v := a.look(at)
		switch {
		case v.err != nil:
			return false, "", v.err
		case v.may:
			return v.inMesh, v.why, nil
		}
		select {
		case <-v.changed:
		case <-ctx.Done():
			return false, "", &attach.Refusal{
				Message: fmt.Sprintf("pod %s waits for the mesh: %s", at.Pod(), v.missing),
				Details: v.fix + "; its start is tried again",
			}
		}
	}
}

// inode is the number of the attachment's namespace, which has to be a pod's.
func (a *Agent) inode(at attach.Attachment) (uint64, error) {
	ns, err := a.open(at.NetNS)
	if err != nil {
		return 0, &attach.Refusal{
			Message: fmt.Sprintf("pod %s: %v", at.Pod(), err),
			Details: "does the agent see the node's network namespaces, /var/run/netns with mount propagation?",
		}
	}
	defer ns.Close()
	return ns.Inode(), nil
}

// Attach takes note of a pod that starts without being admitted.
func (a *Agent) Attach(_ context.Context, at attach.Attachment) (err error) {
	if at.Inode, err = a.inode(at); err != nil {
		return err
	}
	if at.UID == "" {
		at.UID = a.uidOf(at)
	}
	if at.UID == "" {
		return &attach.Refusal{Message: "pod " + at.Pod() + " is not known yet, and its runtime does not say its uid"}
	}
	a.attach(at)
	return nil
}

// Check is Admit for a pod that runs, after its redirection was compared with what
// it should be.
func (a *Agent) Check(ctx context.Context, at attach.Attachment) (inMesh bool, why string, err error) {
	a.mu.Lock()
	if p, ok := a.podLocked(at); ok {
		if w := a.workers[p.UID]; w != nil {
			w.verify()
		}
	}
	a.mu.Unlock()
	return a.Admit(ctx, at)
}

// Detach forgets an attachment; an older one than the pod's last is forgotten
// already.
func (a *Agent) Detach(_ context.Context, at attach.Attachment) error {
	a.mu.Lock()
	for uid, have := range a.admission.attached {
		if have.ContainerID == at.ContainerID {
			a.leaveLocked(uid, have)
		}
	}
	a.mu.Unlock()
	a.wakeAttachLoop()
	if a.cfg.Attachments == nil {
		return nil
	}
	return a.cfg.Attachments.Remove(at.ContainerID)
}

func (a *Agent) leaveLocked(uid string, at attach.Attachment) {
	delete(a.admission.attached, uid)
	a.admission.left[uid] = at.NetNS
	a.admission.dirty[uid] = true
}

// Collect forgets the network's attachments but the valid ones, by container.
func (a *Agent) Collect(ctx context.Context, network string, valid []string) error {
	keep := make(map[string]bool, len(valid))
	for _, id := range valid {
		keep[id] = true
	}
	var stale []attach.Attachment
	a.mu.Lock()
	for _, at := range a.admission.attached {
		if at.Network == network && !keep[at.ContainerID] {
			stale = append(stale, at)
		}
	}
	a.mu.Unlock()
	for _, at := range stale {
		if err := a.Detach(ctx, at); err != nil {
			return err
		}
	}
	return nil
}

// pruneAttachments forgets those whose namespace is gone without a word, for one
// because no agent ran when its runtime said so.
func (a *Agent) pruneAttachments(ctx context.Context) {
	var gone []attach.Attachment
	a.mu.Lock()
	for _, at := range a.admission.attached {
		if inode, err := netns.Inode(at.NetNS); err != nil || inode != at.Inode {
			gone = append(gone, at)
		}
	}
	a.mu.Unlock()
	for _, at := range gone {
		if err := a.Detach(ctx, at); err != nil {
			a.cfg.Logger.Warn("attachment of a pod that is gone", "pod", at.Pod(), "err", err)
		}
	}
}

// Ready reports what keeps pods from being admitted at all.
func (a *Agent) Ready() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.synced {
		return &attach.Refusal{Message: notSynced, Unready: true}
	}
	return nil
}

const notSynced = "the node agent does not know the node's pods yet"

// view is what Admit sees of a pod.
type view struct {
	changed <-chan struct{}
	may     bool
	inMesh  bool
	why     string

	missing, fix string // if it may not
	err          error  // and never will
}

// podLocked finds the pod of an attachment among those that the source lists.
func (a *Agent) podLocked(at attach.Attachment) (Pod, bool) {
	if p, ok := a.admission.pods[at.UID]; ok && p.RuntimeUID == "" {
		return p, true
	}
	for _, p := range a.admission.pods {
		switch {
		case at.UID != "" && p.runtimeUID() == at.UID:
			return p, true
		case at.UID == "" && p.Namespace == at.Namespace && p.Name == at.Name:
			return p, true
		}
	}
	return Pod{}, false
}

// uidOf helps runtimes that do not know a pod's UID.
func (a *Agent) uidOf(at attach.Attachment) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	p, ok := a.podLocked(at)
	if !ok {
		return ""
	}
	return p.runtimeUID()
}

const seeStatus = "see ambit-node status on the node"

func (a *Agent) look(at attach.Attachment) view {
	a.mu.Lock()
	defer a.mu.Unlock()
	v := view{changed: a.admission.changed, fix: seeStatus}
	p, known := a.podLocked(at)
	if at.UID != "" && a.admission.attached[at.UID].ContainerID != at.ContainerID {
		v.err = &attach.Refusal{Message: fmt.Sprintf("pod %s: its sandbox %.12s was removed or replaced meanwhile", at.Pod(), at.ContainerID)}
		return v
	}
	switch {
	case !a.synced:
		v.err = &attach.Refusal{Message: fmt.Sprintf("pod %s waits for the mesh: %s", at.Pod(), notSynced), Details: seeStatus, Unready: true}
	case !known:
		v.missing = "the node agent has not heard of the pod"
		v.fix = "does the agent's --source have the pod, with this node's name in spec.nodeName and uid " + at.UID + "?"
	case p.Undecided:
		v.missing = "the node agent does not know the namespace " + p.Namespace
		v.fix = "does the agent's --source have the namespace?"
	case !p.Enrolled:
		v.may, v.why = true, p.Why
	case a.admission.dirty[at.UID]:
		v.missing = "its enrolment has not begun"
	default:
		a.lookAtWorkerLocked(at, p, &v)
	}
	return v
}

func (a *Agent) lookAtWorkerLocked(at attach.Attachment, p Pod, v *view) {
	w := a.workers[p.UID]
	switch {
	case w == nil:
		v.missing = noAddress
		v.fix = "no plugin before ours in the chain gave it one"
		return
	case a.cfg.Rebuilt && !a.ready.done:
		v.missing = "the node's pods are being captured anew"
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.enabled == at.Inode && w.done == w.asked:
		v.may, v.inMesh, v.why = true, true, p.Why
	case w.failure != "":
		v.missing = w.failure
	default:
		v.missing = "its connections are not captured yet"
	}
}
