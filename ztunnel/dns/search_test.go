package dns

import (
	"fmt"
	"testing"
)

// A host's own search domains are taken off as the cluster's are.
func TestSearchDomainsOfAHost(t *testing.T) {
	c := NewResolver(ResolverConfig{}).Client("shop", "").Searching([]string{"Corp.Example.", "", "cluster.local"})
	if got := fmt.Sprint(c.search, c.more); got != "[shop.svc.cluster.local svc.cluster.local cluster.local] [corp.example]" {
		t.Error(got)
	}
}
