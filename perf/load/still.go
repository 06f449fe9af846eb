package load

// still does nothing but look, three times: what others do meanwhile is to be over
// by the second look, so that the third tells what it costs to have done it.
func (r *run) still(watch []Process) (Result, error) {
	before, err := look(watch)
	if err != nil {
		return Result{}, err
	}
	quiet := r.For / stillPart
	if err := r.wait(r.For - quiet); err != nil {
		return Result{}, err
	}
	over, err := look(watch)
	if err != nil {
		return Result{}, err
	}
	if err := r.wait(quiet); err != nil {
		return Result{}, err
	}
	after, err := look(watch)
	if err != nil {
		return Result{}, err
	}
	out := between(before, after)
	out.Ops = uint64(r.Total)
	for i, u := range between(over, after).Usage {
		out.Usage[i].Later = u.CPU
	}
	out.Later = after.at.Sub(over.at)
	return out, nil
}

// stillPart is which part of a still load comes after what others do.
const stillPart = 3
