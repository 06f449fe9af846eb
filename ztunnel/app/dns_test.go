package app

import (
	"fmt"
	"testing"
)

func TestDNSAddrs(t *testing.T) {
	for in, want := range map[string]string{
		"":                "[]",
		"127.0.0.1:5353":  "[127.0.0.1:5353]",
		"[::1]:15053":     "[[::1]:15053]",
		"localhost:15053": "[127.0.0.1:15053 [::1]:15053]",
		"0.0.0.0:15053":   "0.0.0.0 is no loopback address: the resolver is for its pod only",
		"dns.example:53":  "error",
		"127.0.0.1":       "error",
	} {
		got, err := (&Config{DNSProxyAddr: in}).dnsAddrs()
		if text := fmt.Sprint(got); err == nil && text != want || err != nil && want != "error" && err.Error() != want {
			t.Errorf("%q: %v, %v, want %s", in, got, err, want)
		}
	}
	got, err := (&Config{Mode: dedicated}).dnsAddrs()
	if want := "[127.0.0.1:15053 [::1]:15053]"; fmt.Sprint(got) != want || err != nil {
		t.Errorf("a dedicated proxy: %v, %v, want %s", got, err, want)
	}
}
