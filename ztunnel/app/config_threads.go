package app

import (
	"fmt"
	"math"
	"runtime"
	"strconv"
	"strings"
)

// threads says how many processors the scheduler may use. On a node with many
// the proxy is a guest, so by itself it takes a quarter of them, as the
// reference does; a CPU limit of the container is what the operator wanted.
type threads struct {
	workerThreads         string // a number, a share, 0, "" or auto
	count, limit, request string
	cpus                  int // 0: the machine's
}

// auto reports whether the number is left to the proxy.
func (t threads) auto() bool { return t.workerThreads == "" || t.workerThreads == "auto" }

// workers is the number for runtime.GOMAXPROCS.
func (t threads) workers() (int, error) {
	cpus := t.cpus
	if cpus == 0 {
		cpus = runtime.NumCPU()
	}
	limit, err := cpuQuantity("ZTUNNEL_RESOURCE_CPU_LIMIT", t.limit)
	if err != nil {
		return 0, err
	}
	request, err := cpuQuantity("ZTUNNEL_RESOURCE_CPU_REQUEST", t.request)
	if err != nil {
		return 0, err
	}
	// The downward API gives the node's processors where there is no limit.
	count, err := cpuQuantity("ZTUNNEL_CPU_LIMIT", t.count)
	if err != nil {
		return 0, err
	}
	if count == 0 {
		count = cpus
	}
	if n := runtime.GOMAXPROCS(0); limit == 0 && t.cpus == 0 && n < cpus {
		limit = n // the runtime has found a limit of our control group
	}
	share := func(percent float64) int { return max(1, int(math.Ceil(float64(count)*percent/100))) }
	switch v := t.workerThreads; {
	case t.auto():
		if limit > 0 {
			return min(limit, cpus), nil
		}
		return min(max(share(25), request, 2), cpus), nil
	case strings.HasSuffix(v, "%"):
		percent, err := strconv.ParseFloat(strings.TrimSuffix(v, "%"), 64)
		if err != nil || !(percent > 0 && percent <= 100) {
			return 0, fmt.Errorf("ZTUNNEL_WORKER_THREADS=%q: want a share between 0%% and 100%%", v)
		}
		return share(percent), nil
	default:
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil {
			return 0, fmt.Errorf("ZTUNNEL_WORKER_THREADS=%q: want a number, a share such as 25%%, or auto", v)
		}
		if n == 0 {
			return count, nil
		}
		return int(n), nil
	}
}

// cpuQuantity reads processors as Kubernetes writes them, "2", "1.5" or
// "500m", rounded up; none is 0.
func cpuQuantity(env, s string) (int, error) {
	if s == "" {
		return 0, nil
	}
	digits, unit := s, 1.0
	if d, ok := strings.CutSuffix(s, "m"); ok {
		digits, unit = d, 1000
	}
	f, err := strconv.ParseFloat(digits, 64)
	if err != nil || !(f >= 0 && f/unit <= 65536) {
		return 0, fmt.Errorf("%s=%q: want processors, such as 2, 1.5 or 500m", env, s)
	}
	return int(math.Ceil(f / unit)), nil
}
