//go:build !race

package flow

import (
	"errors"
	"testing"
)

// A refusal that is only counted costs no line: less than one that is told.
func TestSummedRefusalAllocs(t *testing.T) {
	var book logbook
	table := New(Config{Logger: book.logger("info")})
	rec := Record{Direction: Inbound, Pod: "b", Src: src, Dst: dst, SrcID: peer, DstID: dst.Identity, Transport: HBONE, HBONEAddr: "10.0.0.2:80"}
	err := Failed(ReasonAppRefused, errors.New("no"))
	table.Refuse(rec, err)
	if n := testing.AllocsPerRun(100, func() { table.Refuse(rec, err) }); n > 6 {
		t.Errorf("%v allocations, at most 6: the connection and the names of its group", n)
	}
	if got := book.take(); len(got) != 1 {
		t.Errorf("%d lines", len(got))
	}
}

// Timing a decision costs two additions.
func TestDecidedAllocs(t *testing.T) {
	table := New(Config{})
	c, _ := table.Begin(t.Context(), Record{Direction: Inbound})
	defer c.End(nil)
	if n := testing.AllocsPerRun(100, func() { c.decided = false; c.Decided() }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
