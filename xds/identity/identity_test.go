package identity

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		name, in, why string
	}{
		{"workload", "spiffe://cluster.local/ns/default/sa/web", ""},
		{"dots and dashes", "spiffe://td-1.example/ns/a-b/sa/c.d_e", ""},
		{"empty", "", "empty"},
		{"no scheme", "cluster.local/ns/a/sa/b", "scheme"},
		{"other path", "spiffe://cluster.local/workload", "is not spiffe://"},
		{"missing account", "spiffe://cluster.local/ns/a", "is not spiffe://"},
		{"further segment", "spiffe://cluster.local/ns/a/sa/b/c", "is not spiffe://"},
		{"segment in namespace", "spiffe://cluster.local/ns/a/b/sa/c", "is not spiffe://"},
		{"account named sa", "spiffe://cluster.local/ns/sa/sa/sa", ""},
		{"trailing slash", "spiffe://cluster.local/ns/a/sa/", "slash"},
		{"upper case trust domain", "spiffe://Cluster.local/ns/a/sa/b", "trust domain"},
		{"port", "spiffe://cluster.local:8080/ns/a/sa/b", "trust domain"},
		{"query", "spiffe://cluster.local/ns/a/sa/b?c", "path segment"},
		{"percent", "spiffe://cluster.local/ns/a/sa/%62", "path segment"},
		{"dot segment", "spiffe://cluster.local/ns/../sa/b", "dot"},
		{"too long", "spiffe://cluster.local/ns/a/sa/" + strings.Repeat("b", 2048), "at most"},
		{"long trust domain", "spiffe://" + strings.Repeat("b", 256) + "/ns/a/sa/b", "trust domain"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			id, err := Parse(tt.in)
			if tt.why == "" {
				if err != nil || id.String() != tt.in {
					t.Fatalf("Parse = %q, %v", id, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.why) || !id.IsZero() {
				t.Fatalf("Parse = %q, %v, want an error with %q", id, err, tt.why)
			}
		})
	}
}

func TestParts(t *testing.T) {
	id, err := New("td.example", "shop", "cart")
	if err != nil {
		t.Fatal(err)
	}
	got := []string{id.String(), id.Principal(), id.TrustDomain(), id.Namespace(), id.ServiceAccount(), id.URL().String()}
	want := []string{"spiffe://td.example/ns/shop/sa/cart", "td.example/ns/shop/sa/cart", "td.example", "shop", "cart", "spiffe://td.example/ns/shop/sa/cart"}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("part %d = %q, want %q", i, got[i], want[i])
		}
	}
	if id != MustParse(id.String()) {
		t.Error("equal identities differ")
	}
	var zero ID
	if !zero.IsZero() || zero.String()+zero.Principal()+zero.TrustDomain()+zero.Namespace()+zero.ServiceAccount() != "" || zero.URL() != nil {
		t.Error("zero value is not empty")
	}
	if _, err := FromSPIFFE(spiffeid.ID{}); err == nil {
		t.Error("zero SPIFFE ID was accepted")
	}
	for _, parts := range [][3]string{{"", "a", "b"}, {"td", "", "b"}, {"td", "a", ""}, {"td", "a/b", "c"}, {"td", "a", "b/c"}, {"td/ns", "a", "b"}} {
		if id, err := New(parts[0], parts[1], parts[2]); err == nil {
			t.Errorf("New(%q) = %v", parts, id)
		}
	}
}

func TestPartsDoNotAllocate(t *testing.T) {
	id, other := MustParse("spiffe://td/ns/a/sa/b"), MustParse("spiffe://td/ns/a/sa/c")
	n := 0
	if got := testing.AllocsPerRun(100, func() {
		n += len(id.String()) + len(id.Principal()) + len(id.TrustDomain()) + len(id.Namespace()) + len(id.ServiceAccount())
		if id == other {
			n++
		}
	}); got != 0 {
		t.Errorf("%v allocations", got)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"spiffe://cluster.local/ns/a/sa/b", "spiffe:///ns/a/sa/b", "spiffe://td/ns/a/sa/b/sa/c", "\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := Parse(s)
		if err != nil {
			return
		}
		if id.String() != s || id.URL().String() != s {
			t.Fatalf("%q became %q", s, id)
		}
		again, err := New(id.TrustDomain(), id.Namespace(), id.ServiceAccount())
		if err != nil || again != id {
			t.Fatalf("parts of %q make %q, %v", s, again, err)
		}
	})
}
