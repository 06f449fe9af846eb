package app

import (
	"fmt"
	"os"

	"github.com/ambit-mesh/ambit/xds/ca"
	"github.com/ambit-mesh/ambit/xds/derive"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// trust decides who may have which certificate, in the trust domain that the
// mesh configuration says now.
type trust struct {
	engine   *derive.Engine
	accounts []string
}

// Identity implements the server's rule.
func (t *trust) Identity(c ca.Caller, impersonate string) (identity.ID, error) {
	rule := ca.NodeRule{TrustDomain: t.engine.TrustDomain(), Accounts: t.accounts, Placement: t.engine, Pods: t.engine}
	return rule.Identity(c, impersonate)
}

func checkDir(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return fmt.Errorf("source directory: %w (create it, or give another with --source dir:PATH)", err)
	case !info.IsDir():
		return fmt.Errorf("source %s is a file: give the directory that holds it", path)
	}
	return nil
}
