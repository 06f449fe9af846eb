// Package ca is the certificate signing API (generated).
package ca
