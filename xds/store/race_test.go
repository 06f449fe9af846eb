//go:build race

package store

// meshSize under the race detector, which is ten times slower.
const meshSize = 5000
