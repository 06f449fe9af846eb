package load

import (
	"encoding/json"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestQuantilesAreWithinOnePercent(t *testing.T) {
	for _, spread := range []int64{200, 5_000, 3_000_000, 90_000_000_000} {
		rng := rand.New(rand.NewPCG(1, uint64(spread)))
		var h Histogram
		var all []int64
		for range 20_000 {
			v := rng.Int64N(spread)
			all = append(all, v)
			h.Add(v)
		}
		slices.Sort(all)
		for _, q := range []float64{0, 0.25, 0.5, 0.9, 0.99, 0.999} {
			got, ok := h.Quantile(q)
			want := float64(all[int(q*float64(len(all)))])
			if !ok || math.Abs(float64(got)-want) > want/100+1 {
				t.Errorf("below %d: quantile %v is %d, want %v", spread, q, got, want)
			}
		}
		if h.Max() != uint64(all[len(all)-1]) || h.Count() != 20_000 {
			t.Errorf("below %d: max %d, count %d", spread, h.Max(), h.Count())
		}
	}
}

func TestBucketsCoverEveryValue(t *testing.T) {
	last := -1
	for v := uint64(0); v < 1<<40; v += v/300 + 1 {
		b := bucketOf(v)
		if b < last || b > last+1 || b >= buckets {
			t.Fatalf("value %d is in bucket %d after %d", v, b, last)
		}
		last = b
		if v < 1<<maxBits && bucketOf(middle(b)) != b {
			t.Fatalf("%d stands for bucket %d and is in %d", middle(b), b, bucketOf(middle(b)))
		}
	}
}

func TestQuantileWantsEnoughValues(t *testing.T) {
	var h Histogram
	if _, ok := h.Quantile(0.5); ok {
		t.Error("an empty histogram has a median")
	}
	for range 500 {
		h.Add(7)
	}
	if _, ok := h.Quantile(0.999); ok {
		t.Error("500 values have a p99.9")
	}
	if v, ok := h.Quantile(0.99); !ok || v != 7 {
		t.Errorf("p99 of sevens: %d, %v", v, ok)
	}
}

func TestHistogramSurvivesJSONAndMerging(t *testing.T) {
	var a, b, sum Histogram
	for v := int64(-1); v < 1e9; v = v*2 + 1 + v/7 {
		a.Add(v)
		b.Add(v * 3)
		sum.Add(v)
		sum.Add(v * 3)
		if v < 0 {
			v = 1
		}
	}
	text, err := json.Marshal(&a)
	if err != nil {
		t.Fatal(err)
	}
	var back Histogram
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	back.Merge(&b)
	if !slices.Equal(back.counts, sum.counts) || back.n != sum.n || back.max != sum.max {
		t.Errorf("merged: %d values up to %d, want %d up to %d", back.n, back.max, sum.n, sum.max)
	}
}
