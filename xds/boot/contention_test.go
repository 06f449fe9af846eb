package boot

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
)

// TestContentionIsRecordedWhileSomebodyAsks asks once, then twice at a time.
func TestContentionIsRecordedWhileSomebodyAsks(t *testing.T) {
	var told []bool
	c := &contention{record: func(on bool) { told = append(told, on) }}
	depth := 0
	c.handler = http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		if depth++; depth == 2 {
			c.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/?seconds=1", nil))
		}
	})
	for _, tt := range []struct {
		target string
		want   []bool
	}{{"/", nil}, {"/?seconds=1", []bool{true, false}}, {"/?seconds=2", []bool{true, false, true, false}}} {
		c.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", tt.target, nil))
		if !slices.Equal(told, tt.want) {
			t.Errorf("after %s: told %v, want %v", tt.target, told, tt.want)
		}
	}
}
