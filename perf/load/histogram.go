package load

import (
	"encoding/json"
	"fmt"
	"math/bits"
)

// Histogram counts values in buckets whose width is less than one percent of
// their value. The zero value is empty. It is not safe for concurrent use.
type Histogram struct {
	counts []uint64 // by bucket; nil while empty
	n, max uint64
}

const (
	// Values below 2^(subBits+1) have buckets of their own; above, each power of
	// two is divided into 2^subBits.
	subBits = 7
	maxBits = 37 // 2^37 ns are 137 s: longer ones count as that
	buckets = (maxBits - subBits + 1) << subBits
)

func bucketOf(v uint64) int {
	if v < 2<<subBits {
		return int(v)
	}
	v = min(v, 1<<maxBits-1)
	shift := bits.Len64(v) - subBits - 1
	return shift<<subBits + int(v>>shift)
}

// middle is the value that stands for a bucket.
func middle(b int) uint64 {
	if b < 2<<subBits {
		return uint64(b)
	}
	shift := b>>subBits - 1
	return uint64(b-shift<<subBits)<<shift + 1<<shift/2
}

// Add counts a value; negative ones count as 0.
func (h *Histogram) Add(v int64) { h.add(bucketOf(uint64(max(v, 0))), 1, uint64(max(v, 0))) }

func (h *Histogram) add(b int, n, top uint64) {
	if h.counts == nil {
		h.counts = make([]uint64, buckets)
	}
	h.counts[b] += n
	h.n += n
	h.max = max(h.max, top)
}

// Merge adds another's values.
func (h *Histogram) Merge(o *Histogram) {
	for b, n := range o.counts {
		if n > 0 {
			h.add(b, n, o.max)
		}
	}
}

// Count is the number of values.
func (h *Histogram) Count() uint64 { return h.n }

// Max is the largest value; 0 where there is none.
func (h *Histogram) Max() uint64 {
	if h == nil {
		return 0
	}
	return h.max
}

// Quantile is the value below which the share q of all values lies. It is false
// where too few values say anything about it: fewer than one is expected above.
func (h *Histogram) Quantile(q float64) (uint64, bool) {
	if h == nil || h.n == 0 || float64(h.n)*(1-q) < 1 {
		return 0, false
	}
	rank := min(uint64(q*float64(h.n)), h.n-1)
	for b, n := range h.counts {
		if rank < n {
			return min(middle(b), h.max), true
		}
		rank -= n
	}
	panic("BUG: a histogram holds fewer values than it counted")
}

// histogramJSON lists the buckets that are not empty as [value, count].
type histogramJSON struct {
	Max     uint64      `json:"max"`
	Buckets [][2]uint64 `json:"buckets"`
}

// MarshalJSON writes the values that stand for buckets, so that a reader needs to
// know nothing of their numbers.
func (h *Histogram) MarshalJSON() ([]byte, error) {
	out := histogramJSON{Max: h.max, Buckets: [][2]uint64{}}
	for b, n := range h.counts {
		if n > 0 {
			out.Buckets = append(out.Buckets, [2]uint64{middle(b), n})
		}
	}
	return json.Marshal(out)
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (h *Histogram) UnmarshalJSON(b []byte) error {
	var in histogramJSON
	if err := json.Unmarshal(b, &in); err != nil {
		return fmt.Errorf("read histogram: %w", err)
	}
	*h = Histogram{}
	for _, pair := range in.Buckets {
		h.add(bucketOf(pair[0]), pair[1], in.Max)
	}
	return nil
}
