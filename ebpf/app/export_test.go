package app

import "strconv"

// Capabilities lists by number what an agent with a redirector needs.
func Capabilities(kind string) (bits []string) {
	for _, c := range capabilities {
		if c.kind == "" || c.kind == kind {
			bits = append(bits, strconv.Itoa(int(c.bit)))
		}
	}
	return bits
}
