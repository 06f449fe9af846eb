package hbone

import "testing"

// Nobody lets others pass in vain for ever, and a tunnel that gets company finds out.
func TestRallyGivesUpAndComesBack(t *testing.T) {
	var r rally
	passed := func(flushes int, company bool) (n int) {
		for range flushes {
			if r.worth() {
				n++
				r.begin()
				r.joined = company
				r.end()
			}
		}
		return n
	}
	if n := passed(rallyTries, false); n != rallyTries {
		t.Errorf("%d of the first %d flushes let others pass, want all", n, rallyTries)
	}
	passed(1<<(rallyPass+2), false)
	if n := passed(10<<rallyPass, false); n > 10 {
		t.Errorf("%d of %d let others pass, where there never are any", n, 10<<rallyPass)
	}
	passed(1<<rallyPass, true)
	if n := passed(100, true); n != 100 {
		t.Errorf("%d of 100 let others pass, where there always are some", n)
	}
	passed(rallyTries, false)
	if n := passed(1, true); n != 1 {
		t.Error("a few turns without company were taken for the end of it")
	}
}

// Who comes while somebody lets others pass leaves his frames with it: one batch.
func TestRallyLeavesTogether(t *testing.T) {
	rec := &batchRecorder{}
	w := newWriter(rec, func(err error) { t.Error(err) })
	queue := func(b byte) {
		w.packLocked([]byte{b})
		w.flushTogetherLocked()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rally.begin() // as if by one that waits for its turn
	queue(1)
	queue(2)
	if len(rec.batches) != 0 {
		t.Fatalf("left before the others had their turn: %v", rec.batches)
	}
	if w.rally.end(); w.rally.alone != 0 {
		t.Error("two came, and nobody was noticed")
	}
	w.flushLocked()
	queue(3) // nobody else is there: it leaves all the same
	if len(rec.batches) != 2 || string(rec.batches[0]) != "\x01\x02" || string(rec.batches[1]) != "\x03" {
		t.Errorf("batches %q, want two: of both, and of the third", rec.batches)
	}
	if w.rally.alone != 1 {
		t.Errorf("alone %d times, want 1", w.rally.alone)
	}
}
