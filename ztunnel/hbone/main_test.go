package hbone

import (
	"flag"
	"os"
	"testing"

	"github.com/ambit-mesh/ambit/test/leak"
)

// ambitLayer makes the package's tests run over our own record layer instead of crypto/tls's.
var ambitLayer = os.Getenv("AMBIT_TLS_RECORDS") == "ambit"

// TestMain runs the tests once over each record layer: they must not be told apart. Benchmarks and fuzzing run once,
// over the one that the environment names.
func TestMain(m *testing.M) {
	before := leak.Descriptors()
	flag.Parse()
	code := m.Run()
	if code == 0 && flag.Lookup("test.bench").Value.String() == "" && flag.Lookup("test.fuzz").Value.String() == "" {
		ambitLayer = !ambitLayer
		_ = flag.Set("test.testlogfile", "") // the first run has written and closed it
		code = m.Run()
	}
	if left := leak.Check(before); left != "" && code == 0 {
		println(left)
		code = 1
	}
	os.Exit(code)
}
