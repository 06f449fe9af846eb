package hamt

import (
	"encoding/binary"
	"hash/maphash"
	"math/bits"
	"net/netip"
)

// seed differs per process, so that a tenant who chooses names or addresses
// cannot choose collisions.
var seed = maphash.MakeSeed()

// HashString hashes a string.
func HashString(s string) uint64 { return maphash.String(seed, s) }

// HashBytes hashes the bytes of a string as HashString does.
func HashBytes(b []byte) uint64 { return maphash.Bytes(seed, b) }

// Mix combines two hashes.
func Mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a^0x9e3779b97f4a7c15, b^0xbf58476d1ce4e5b9)
	return hi ^ lo
}

var addrSeed = maphash.String(seed, "address")

// HashAddr hashes an address without its zone.
func HashAddr(a netip.Addr) uint64 {
	b := a.As16()
	return Mix(Mix(addrSeed, binary.LittleEndian.Uint64(b[:8])), Mix(^addrSeed, binary.LittleEndian.Uint64(b[8:])))
}
