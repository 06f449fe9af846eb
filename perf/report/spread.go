package report

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
)

// Spread is a median with its quartiles, and the interval in which the median of all
// such values lies as sure as Sure says.
type Spread struct {
	Low, Median, High float64
	N                 int
	From, To, Sure    float64
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
	k, sure := interval(len(v))
	return Spread{at(0.25), at(0.5), at(0.75), len(v), v[k], v[len(v)-1-k], sure}
}

// sureEnough is what an interval is to be, where there are values enough.
const sureEnough = 0.95

// interval says which of n sorted values, counted from either end, enclose the median
// of what they were drawn from: each is on either side of it with probability 1/2, so
// that the k lowest and the k highest are on their own sides with the probability of
// as many heads (the sign test, turned round). It assumes nothing of how values are
// spread. With fewer than six of them the extremes are less sure than that.
func interval(n int) (k int, sure float64) {
	sure = 1
	below, ways := 0.0, math.Pow(0.5, float64(n)) // of exactly k heads
	for i := range (n + 1) / 2 {
		below += ways
		if now := 1 - 2*below; i == 0 || now >= sureEnough {
			k, sure = i, now
		}
		ways *= float64(n-i) / float64(i+1)
	}
	return k, max(sure, 0)
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

// Interval shows the median, and the interval where there are several values.
func (s Spread) Interval() string {
	if s.N < 2 {
		return s.String()
	}
	return fmt.Sprintf("%s (%s–%s)", figure(s.Median), figure(s.From), figure(s.To))
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
	switch {
	case a >= 999.5e3:
		s = strconv.FormatFloat(v/1e6, 'f', 2, 64) + "M"
	case a >= 10000:
		s = strconv.FormatFloat(v/1000, 'f', 1, 64) + "k"
	}
	return s
}

// Apart reports whether the intervals of two spreads do not overlap, and which one is
// higher: -1, 0, +1.
func Apart(a, b Spread) int {
	if a.N < 2 || b.N < 2 || a.From <= b.To && b.From <= a.To {
		return 0
	}
	return cmp.Compare(a.Median, b.Median)
}
