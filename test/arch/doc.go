// Package arch holds the architecture as tests: which package may import which,
// what the proxies never link, and that every package explains itself.
package arch
