package command_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/ebpf/cni/command"
	"github.com/ambit-mesh/ambit/test/leak"
)

func TestMain(m *testing.M) { leak.Main(m) }

func TestCommandLine(t *testing.T) {
	for _, tc := range []struct {
		args []string
		code int
		say  string
	}{
		{[]string{"version"}, 0, "ambit-cni "},
		{[]string{"help"}, 0, "ambit-cni install"},
		{[]string{"install", "--help"}, 0, "-cni-conf-dir"},
		{[]string{"dance"}, 2, `no command "dance"`},
		{[]string{"install", "--no-such-flag"}, 2, "no-such-flag"},
		{[]string{"uninstall", "extra"}, 2, "extra"},
		{[]string{"install", "--cni-conf-dir", "", "--cni-bin-dir", ""}, 1, "--cni-bin-dir is required"},
		{[]string{"install", "--timeout-seconds", "5000"}, 1, "timeoutSeconds: 5000"},
		{[]string{"install", "--cni-socket", "cni.sock"}, 1, "not an absolute path"},
		{nil, 0, "CNI plugin ambit-cni"}, // as the specification has it without CNI_COMMAND
	} {
		var out bytes.Buffer
		code := command.Main(t.Context(), tc.args, &out, &out)
		if len(tc.args) > 0 && (code != tc.code || !strings.Contains(out.String(), tc.say)) || code != tc.code {
			t.Errorf("%v: status %d, %q; want %d and %q", tc.args, code, out.String(), tc.code, tc.say)
		}
	}
}

func TestInstallAndUninstallCommands(t *testing.T) {
	dir := t.TempDir()
	conf, bin := filepath.Join(dir, "net.d"), filepath.Join(dir, "bin")
	flags := []string{"--cni-conf-dir", conf, "--cni-bin-dir", bin}
	run := func(name string, args ...string) (int, string) {
		var out bytes.Buffer
		code := command.Main(t.Context(), append(append([]string{name}, flags...), args...), &out, &out)
		return code, out.String()
	}
	if code, out := run("install"); code != 1 || !strings.Contains(out, "no network configuration to chain to yet") {
		t.Errorf("no directory: %d, %s", code, out)
	}
	const list = `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}]}`
	path := filepath.Join(conf, "10-n.conflist")
	if err := os.Mkdir(conf, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(list), 0o644); err != nil {
		t.Fatal(err)
	}
	if code, out := run("install", "--timeout-seconds", "20", "--exclude-namespaces", "infra"); code != 0 {
		t.Fatalf("install: %d, %s", code, out)
	}
	want := `{"type":"ptp"},{"type":"ambit-cni","socket":"/var/run/ambit/cni.sock","stateDir":"/var/lib/ambit/cni","timeoutSeconds":20,"excludeNamespaces":["infra"]}]}`
	if got, err := os.ReadFile(path); err != nil || !strings.HasSuffix(string(got), want) {
		t.Errorf("%v, configuration %s", err, got)
	}
	if code, out := run("uninstall"); code != 0 {
		t.Fatalf("uninstall: %d, %s", code, out)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != list {
		t.Errorf("%v, configuration %s", err, got)
	}
}
