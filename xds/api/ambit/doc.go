// Package ambit is what only Ambit's own proxies understand on the wire (generated).
package ambit
