# Ambit. `make help` lists the targets.
SHELL := /bin/bash
GO    ?= go

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
PROGRAMS := $(addsuffix /...,$(wildcard ./*/cmd)) # every folder below is one program
LDFLAGS  := -s -w -X github.com/ambit-mesh/ambit/xds/boot.Version=$(VERSION)

export CGO_ENABLED

.PHONY: help build cross generate lint test interop fuzz demo lab bench perf check-go clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

check-go:
	@command -v $(GO) >/dev/null || { echo "make: the Go toolchain is missing: install Go $$(awk '/^go /{print $$2}' go.mod) or newer and put it in PATH"; exit 1; }

build: CGO_ENABLED = 0
build: check-go ## build every program into bin/ as a static binary
	@mkdir -p bin
	@GOPROXY=off $(GO) list -test -deps ./... >/dev/null 2>&1 || { echo "downloading Go modules, once:"; \
	  $(GO) mod download -x 2>&1 | sed -n 's|^# get https*://[^/]*/\(.*\)/@v/\(.*\)\.zip: 200.*|  \1 \2|p'; }
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ $(PROGRAMS)
	@ls -1 bin | sed 's/^/  bin\//'

cross: CGO_ENABLED = 0
cross: check-go ## compile every program for linux/amd64 and linux/arm64
	@for arch in amd64 arm64; do echo "linux/$$arch"; mkdir -p bin/linux-$$arch; GOOS=linux GOARCH=$$arch $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/linux-$$arch/ $(PROGRAMS) || exit 1; done

# The compiler's version is part of what makes its output the same everywhere.
CLANG := clang-14

generate: check-go ## rewrite generated files (protocols, kernel programs)
	@command -v $(CLANG) >/dev/null && test -e /usr/include/bpf/bpf_helpers.h || { \
	  command -v apt-get >/dev/null && test "$$(id -u)" = 0 || { echo "make: kernel programs want $(CLANG), llvm-strip-14 and libbpf's headers (Debian: $(CLANG) llvm-14 libbpf-dev)"; exit 1; }; \
	  apt-get install -y --no-install-recommends $(CLANG) llvm-14 libbpf-dev; }
	$(GO) generate ./...

lint: check-go ## gofmt, vet, staticcheck
	@out=$$(git ls-files '*.go' | xargs gofmt -l); test -z "$$out" || { echo "not gofmt'ed:"; echo "$$out"; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags interop ./test/interop
	$(GO) tool staticcheck ./...

test: check-go ## every test, race detector on; what this machine cannot run is listed at the end
	$(GO) run ./test/cmd/ambit-test ./...

interop: check-go ## every case against another node proxy, as root: ZTUNNEL=/path/to/its/program
	@test -x "$(ZTUNNEL)" || { echo "make: interop wants the other proxy's program: make interop ZTUNNEL=/path/to/ztunnel"; exit 1; }
	AMBIT_INTEROP_ZTUNNEL="$(abspath $(ZTUNNEL))" $(GO) test -tags interop -count 1 -timeout 30m -v $(if $(RUN),-run '$(RUN)') ./test/interop

FUZZTIME ?= 5s
fuzz: check-go ## run every fuzz target for FUZZTIME (5s)
	$(GO) run ./test/cmd/ambit-test --fuzz $(FUZZTIME) ./...

demo: build ## a two-node mesh on this machine, told as a story
	bin/ambit-lab demo

lab: build ## start the lab and leave it running (bin/ambit-lab down ends it)
	bin/ambit-lab up

BENCH ?= .
BENCHTIME ?= 1s
bench: check-go ## benchmarks beside the code; BENCH=regexp BENCHTIME=1s COUNT=1
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchtime $(BENCHTIME) -count $(or $(COUNT),1) -benchmem ./xds/... ./ebpf/... ./ztunnel/...

# PERF holds what to measure: PERF=--all, PERF='--peer ztunnel=/path/to/ztunnel'.
PERF ?= --quick
perf: build ## the quick set of loads, side by side with no mesh: tables, bin/perf.json, bin/perf.html; PERF=--all, PERF='--peer ztunnel=PATH'
	bin/ambit-perf run $(if $(filter --all,$(PERF)),,--quick) $(PERF) --json bin/perf.json --html bin/perf.html

clean: ## remove bin/
	rm -rf bin
