// Package trust tests what proxies trust through both of its halves: ambitd's
// certificate authority with its commands, and the node proxy's certificates
// and tunnels, over loopback and under load.
package trust
