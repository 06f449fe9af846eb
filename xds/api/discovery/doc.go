// Package discovery is the part of Envoy's discovery API that delta xDS uses (generated).
package discovery
