// Package trust is how Ambit's control plane tells proxies of roots and
// revocations as they change (generated).
package trust
