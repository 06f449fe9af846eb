package app

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/test/leak"
)

// TestMain is leak.Main, except that pipes may stay: relay keeps a bounded
// number of empty ones for the next splice.
func TestMain(m *testing.M) {
	known := map[string]bool{}
	for _, fd := range leak.Descriptors() {
		known[fd] = true
	}
	code := m.Run()
	http.DefaultClient.CloseIdleConnections()
	if code == 0 {
		if left := leftover(known); left != "" {
			fmt.Println("leak:", left)
			code = 1
		}
	}
	os.Exit(code)
}

// leftover waits a moment for what is ending.
func leftover(known map[string]bool) string {
	var left []string
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		left = leak.Goroutines()
		for _, fd := range leak.Descriptors() {
			if !known[fd] && !strings.Contains(fd, "pipe:") {
				left = append(left, "descriptor "+fd)
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			return strings.Join(left, "\n")
		}
	}
}
