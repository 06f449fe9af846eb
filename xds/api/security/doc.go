// Package security is layer 4 authorization policies on the wire (generated).
package security
