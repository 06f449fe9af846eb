package hbone

// rally is a flush that lets other goroutines pass, and how it went for those before it. Where nobody joined, a turn of
// the scheduler was lost, and time: others may be busy with what takes long. When that has happened some times in a row,
// the next flushes let nobody pass, and twice as many each time. The writer's lock guards it.
type rally struct {
	on     bool // somebody flushes as soon as it has its turn again
	joined bool // meanwhile somebody came who would have flushed as well
	alone  int  // how often in a row nobody did
	pass   int  // how many flushes are still to come that let nobody pass
}

const (
	// rallyTries is how often in a row there may be nobody.
	rallyTries = 4
	// rallyPass bounds how many flushes let nobody pass, as a power of two: a tunnel that gets company finds out.
	rallyPass = 6
)

// worth reports whether to let others pass.
func (r *rally) worth() bool {
	if r.pass > 0 {
		r.pass--
		return false
	}
	return true
}

func (r *rally) begin() { r.on, r.joined = true, false }

func (r *rally) end() {
	r.on = false
	if r.joined {
		r.alone = 0
		return
	}
	r.alone = min(r.alone+1, rallyTries+rallyPass)
	if r.alone > rallyTries {
		r.pass = 1<<(r.alone-rallyTries) - 1
	}
}
