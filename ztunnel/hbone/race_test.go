//go:build race

package hbone

// raceEnabled: sync.Pool then drops entries at random, and allocation budgets mean nothing.
const raceEnabled = true
