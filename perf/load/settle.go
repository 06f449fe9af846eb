package load

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
)

// settle makes many connections with a request each, a few at a time, closes them,
// and waits. Growth is what processes have at the end of the wait and had not
// before; how much there was right after the last connection is a figure.
func (r *run) settle(watch []Process) (Result, error) {
	before, err := look(watch)
	if err != nil {
		return Result{}, err
	}
	var left atomic.Int64
	left.Store(int64(r.Total))
	var live sync.WaitGroup
	for i := range r.workers {
		live.Go(func() {
			w, first, b := &r.workers[i], open(verbAnswer, r.Size), make([]byte, r.Size)
			for left.Add(-1) >= 0 && r.ctx.Err() == nil && r.faults() <= dialling {
				began := monotonic()
				c, err := r.dial(first)
				if err == nil {
					_, err = io.ReadFull(c, b)
					r.close(c)
				}
				if err != nil {
					r.fault(err)
					continue
				}
				w.ops.Add(1)
				w.hist.Add(int64(monotonic() - began))
			}
		})
	}
	live.Wait()
	busy, err := look(watch)
	if err != nil {
		return Result{}, err
	}
	ops, _ := r.counts()
	if ops == 0 {
		return Result{}, errors.New(r.first)
	}
	if err := r.wait(r.For); err != nil {
		return Result{}, err
	}
	after, err := look(watch)
	if err != nil {
		return Result{}, err
	}
	out := between(before, after)
	out.Ops = ops
	out.Figures = map[string]float64{}
	for i, p := range busy.procs {
		if p.Proxy {
			out.Figures[FigureChurned] += float64(p.rss) / (1 << 20)
			out.Figures[FigureBefore] += float64(before.procs[i].rss) / (1 << 20)
		}
	}
	r.collect(&out)
	return out, nil
}
