package hamt

import (
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// hashes that collide wholly, partly and hardly.
var hashes = map[string]func(int) uint64{
	"all collide":    func(int) uint64 { return 7 },
	"last bits":      func(k int) uint64 { return uint64(k) << 59 },
	"few":            func(k int) uint64 { return uint64(k % 5) },
	"spread":         func(k int) uint64 { return Mix(uint64(k), 42) },
	"differ at last": func(k int) uint64 { return uint64(k%16) << 60 },
}

func TestMapAgainstBuiltin(t *testing.T) {
	for name, hash := range hashes {
		t.Run(name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 2))
			m := NewMap[int, int](hash)
			model := map[int]int{}
			type version struct {
				m     Map[int, int]
				model map[int]int
			}
			var old []version
			var ed *Edit
			for step := range 3000 {
				if step%50 == 0 {
					if step%100 == 0 {
						ed = nil
					} else {
						ed = &Edit{}
					}
					old = append(old, version{m, maps.Clone(model)})
				}
				k := r.IntN(120)
				if r.IntN(3) == 0 {
					m = m.Delete(ed, k)
					delete(model, k)
				} else {
					m = m.Set(ed, k, step)
					model[k] = step
				}
				if step%50 == 49 {
					check(t, m, model)
				}
			}
			for _, v := range old { // earlier versions did not change
				check(t, v.m, v.model)
			}
		})
	}
}

func check(t *testing.T, m Map[int, int], model map[int]int) {
	t.Helper()
	if m.Len() != len(model) || !maps.Equal(maps.Collect(m.All()), model) {
		t.Fatalf("map %v, want %v", maps.Collect(m.All()), model)
	}
	for k := range 130 {
		got, ok := m.Get(k)
		if e := m.x.Find(m.x.by.Hash(k), func(e *entry[int, int]) bool { return e.key == k }); (e != nil) != ok || ok && e.val != got {
			t.Fatalf("Find(%d) = %v, want %d, %v", k, e, got, ok)
		}
		want, wantOK := model[k]
		if got != want || ok != wantOK {
			t.Fatalf("Get(%d) = %d, %v, want %d, %v", k, got, ok, want, wantOK)
		}
	}
}

func TestVectorAgainstSlice(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	var v Vector[int]
	var model []int
	type version struct {
		v     Vector[int]
		model []int
	}
	var old []version
	var ed *Edit
	grow := true
	for step := range 20000 {
		if step%997 == 0 {
			ed = nil
			if step%2 == 0 {
				ed = &Edit{}
			}
			old = append(old, version{v, slices.Clone(model)})
		}
		switch {
		case len(model) > 2500:
			grow = false
		case len(model) == 0:
			grow = true
		}
		switch n := r.IntN(4); {
		case n == 0 && len(model) > 0:
			i := r.IntN(len(model))
			v, model[i] = v.Set(ed, i, step), step
		case grow:
			v, model = v.Set(ed, v.Len(), step), append(model, step)
		case len(model) > 0:
			v, model = v.Pop(ed), model[:len(model)-1]
		}
	}
	old = append(old, version{v, model})
	for _, o := range old {
		if o.v.Len() != len(o.model) {
			t.Fatalf("Len = %d, want %d", o.v.Len(), len(o.model))
		}
		for i, want := range o.model {
			if got := *o.v.At(i); got != want {
				t.Fatalf("At(%d) = %d, want %d", i, got, want)
			}
		}
	}
}

func BenchmarkMapGet100k(b *testing.B) {
	m := NewMap[int, int](func(k int) uint64 { return Mix(uint64(k), 42) })
	ed := &Edit{}
	for i := range 100000 {
		m = m.Set(ed, i, i)
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i = (i + 7919) % 100000
		if _, ok := m.Get(i); !ok {
			b.Fatal("missing")
		}
	}
}
