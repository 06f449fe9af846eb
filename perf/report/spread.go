package report

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
)

// Spread is a median with its quartiles.
type Spread struct {
	Low, Median, High float64
	N                 int
	Min, Max          float64
}

// SpreadOf computes it; quartiles are interpolated between neighbours.
func SpreadOf(values []float64) Spread {
	if len(values) == 0 {
		return Spread{}
	}
	v := slices.Sorted(slices.Values(values))
	at := func(q float64) float64 {
		x := q * float64(len(v)-1)
		i := int(x)
		if i+1 == len(v) {
			return v[i]
		}
		return v[i] + (x-float64(i))*(v[i+1]-v[i])
	}
	return Spread{at(0.25), at(0.5), at(0.75), len(v), v[0], v[len(v)-1]}
}

// String shows the median, and the quartiles where there are several values.
func (s Spread) String() string {
	switch {
	case s.N == 0:
		return "–"
	case s.N == 1:
		return figure(s.Median)
	}
	return fmt.Sprintf("%s (%s–%s)", figure(s.Median), figure(s.Low), figure(s.High))
}

// figure shows three digits, and all digits before the point.
func figure(v float64) string {
	a := math.Abs(v)
	digits := 0
	switch {
	case a == 0 || a >= 100:
	case a >= 10:
		digits = 1
	case a >= 1:
		digits = 2
	case a >= 0.1:
		digits = 3
	default:
		digits = 4
	}
	s := strconv.FormatFloat(v, 'f', digits, 64)
	if a >= 10000 {
		s = strconv.FormatFloat(v/1000, 'f', 1, 64) + "k"
	}
	return s
}

// Noise is where the next round would not surprise: between the quartiles, and
// between the extremes where there are too few rounds for quartiles to mean much.
func (s Spread) Noise() (low, high float64) {
	if s.N < 4 {
		return s.Min, s.Max
	}
	return s.Low, s.High
}

// Apart reports whether two spreads do not overlap beyond noise, and which one is
// higher: -1, 0, +1.
func Apart(a, b Spread) int {
	aLow, aHigh := a.Noise()
	bLow, bHigh := b.Noise()
	if a.N < 2 || b.N < 2 || aLow <= bHigh && bLow <= aHigh {
		return 0
	}
	return cmp.Compare(a.Median, b.Median)
}
