package mesh

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"

	"github.com/ambit-mesh/ambit/test/lab/kubelet"
)

// Programs' sockets and state of a node.
func (m *Mesh) cniSocket(node string) string { return filepath.Join(m.Dir, node, "cni.sock") }
func (m *Mesh) stateDir(node string) string  { return filepath.Join(m.Dir, node, "state") }

// cniTimeout is how long one call waits, in seconds: shorter than in a cluster, so
// that a pod's status says sooner what it waits for.
const cniTimeout = 10

// CNI calls the plugin as a container runtime does, behind a plugin that has given
// the pod its addresses already. command is ADD or DEL.
func (m *Mesh) CNI(ctx context.Context, command string, s kubelet.Sandbox) error {
	type object = map[string]any
	var ips []object
	for _, a := range s.Addrs {
		ips = append(ips, object{"address": fmt.Sprintf("%s/%d", a, a.BitLen()), "interface": 0})
	}
	conf, err := json.Marshal(object{
		"cniVersion": "1.0.0", "name": "lab", "type": "ambit-cni",
		"socket": m.cniSocket(s.Node), "stateDir": m.stateDir(s.Node), "timeoutSeconds": cniTimeout,
		"prevResult": object{"cniVersion": "1.0.0", "interfaces": []object{{"name": "eth0", "sandbox": s.NetNS}}, "ips": ips},
	})
	if err != nil {
		return fmt.Errorf("describe pod to the CNI plugin: %w", err)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(m.Bin, "ambit-cni"))
	cmd.Env = []string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + s.UID, "CNI_NETNS=" + s.NetNS, "CNI_IFNAME=eth0", "CNI_PATH=" + m.Bin,
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=" + s.Namespace + ";K8S_POD_NAME=" + s.Name + ";K8S_POD_UID=" + s.UID,
	}
	cmd.Stdin = bytes.NewReader(conf)
	out, err := cmd.Output()
	if err == nil {
		return nil
	}
	var said struct{ Msg, Details string }
	if json.Unmarshal(out, &said) == nil && said.Msg != "" {
		return errors.New(said.Msg + "; " + said.Details)
	}
	return fmt.Errorf("call the CNI plugin: %w: %s", err, out)
}
