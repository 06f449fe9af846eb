//go:build !race

package store

// meshSize is that of a large mesh.
const meshSize = 70000
