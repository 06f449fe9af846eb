package app

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
)

func TestResolvConfOfAPlainHost(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	text := "# made by hand\nsearch old.example\nnameserver 127.0.0.1\nnameserver 127.0.0.53\nnameserver 10.0.0.53\nnameserver x\nsearch corp.example lab.example\noptions ndots:2\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c := readResolvConf(path)
	if got := fmt.Sprint(c.servers, c.search); got != "[127.0.0.53 10.0.0.53] [corp.example lab.example]" {
		t.Error(got)
	}
	client, local, orig := netip.MustParseAddrPort("127.0.0.1:9"), netip.MustParseAddrPort("127.0.0.1:15053"), netip.MustParseAddrPort("10.9.9.9:53")
	for _, tt := range []struct {
		dst  netip.AddrPort
		err  error
		want string
	}{{orig, nil, "10.9.9.9:53"}, {local, nil, "127.0.0.53:53"}, {netip.AddrPort{}, errors.New("no permission"), "127.0.0.53:53"}} {
		got, err := c.datagram(func(_, _ netip.AddrPort) (netip.AddrPort, error) { return tt.dst, tt.err })(client, local)
		if err != nil || got.String() != tt.want {
			t.Errorf("%v, %v: forwarded to %v, %v", tt.dst, tt.err, got, err)
		}
	}
	if c := readResolvConf(path + ".none"); len(c.servers)+len(c.search) != 0 {
		t.Errorf("of no file: %+v", c)
	}
}
