package e2e

import (
	"strings"
	"testing"
)

// starter is a pod on node-1 whose only process calls a server once and says what
// came of it.
const starter = `
apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: NAMESPACE}
spec:
  nodeName: node-1
  restartPolicy: Never
  containers: [{name: c, image: busybox, command: [sh, -c, "curl -sS --max-time 60 http://far.default:8080/; sleep 600"]}]
`

const farService = `
apiVersion: v1
kind: Service
metadata: {name: far}
spec: {selector: {app: far}, ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: plain}
`

func (l *lab) start(namespace, name string) {
	l.t.Helper()
	l.apply(strings.NewReplacer("NAMESPACE", namespace, "NAME", name).Replace(starter))
}

// podSays waits until the pod's object has the text.
func (l *lab) podSays(why, namespace, name, text string) {
	l.t.Helper()
	l.until(why, func() (bool, string) {
		y := l.must("get", "pod", name, "-n", namespace, "-o", "yaml")
		return strings.Contains(y, text), y
	})
}

func TestPodsWaitForTheirRedirection(t *testing.T) { each(t, testPodsWaitForTheirRedirection) }

func testPodsWaitForTheirRedirection(t *testing.T, redirect string) {
	l := enrolPair(t, redirect)
	l.apply(farService)
	l.must("wait", "--timeout", "110s")

	l.must("kill", "ztunnel@node-1", "-s", "STOP")
	l.start("default", "early")
	l.start("plain", "other")
	l.podSays("a pod outside the mesh starts", "plain", "other", "phase: Running")
	l.podSays("a pod of the mesh says what it waits for", "default", "early", "hand over to ztunnel")
	if y := l.must("get", "pod", "early", "-o", "yaml"); strings.Contains(y, "podIP:") || strings.Contains(y, "containerID:") {
		t.Errorf("it has started all the same:\n%s", y)
	}
	l.must("kill", "ztunnel@node-1", "-s", "CONT")
	l.podSays("and starts when it is served", "default", "early", "phase: Running")
	l.until("its first call is one of the mesh", func() (bool, string) {
		out := l.must("logs", "early")
		return strings.Contains(out, `"method": "GET"`), out
	})
	l.until("the server's side knows who called", func() (bool, string) {
		log := l.must("logs", "ztunnel@node-2", "--tail", "200")
		return strings.Contains(log, `src.workload="early"`), log
	})

	// An agent that hangs is worse than none: it accepts and does not answer.
	l.must("kill", "ambit-node@node-1", "-s", "STOP")
	l.start("default", "late")
	l.start("plain", "another")
	l.podSays("a pod outside the mesh starts without the agent", "plain", "another", "phase: Running")
	l.podSays("a pod of the mesh waits for the agent", "default", "late", "does not answer")
	l.must("kill", "ambit-node@node-1", "-s", "CONT")
	l.podSays("and starts when it is there", "default", "late", "phase: Running")
}
