package app

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// proxyConfig is what the reference takes from Istio's ProxyConfig, given as
// PROXY_CONFIG and as defaultConfig of the mesh file. Other keys are for other
// proxies.
type proxyConfig struct {
	DiscoveryAddress         *string           `yaml:"discoveryAddress"`
	ProxyAdminPort           *uint16           `yaml:"proxyAdminPort"`
	StatusPort               *uint16           `yaml:"statusPort"`
	StatsPort                *uint16           `yaml:"statsPort"`
	Concurrency              *uint16           `yaml:"concurrency"`
	TerminationDrainDuration *string           `yaml:"terminationDrainDuration"`
	ProxyMetadata            map[string]string `yaml:"proxyMetadata"`
}

// proxyConfig gives env what the two documents set and env does not.
func readProxyConfig(env map[string]string) (errs []error) {
	var own proxyConfig
	if err := yaml.Unmarshal([]byte(env["PROXY_CONFIG"]), &own); err != nil {
		errs = append(errs, fmt.Errorf("PROXY_CONFIG: %w", err))
	}
	own.fill(env)
	if b, err := os.ReadFile(meshFile); err == nil {
		var mesh struct {
			DefaultConfig proxyConfig `yaml:"defaultConfig"`
		}
		if err := yaml.Unmarshal(b, &mesh); err != nil {
			errs = append(errs, fmt.Errorf("mesh configuration %s: %w", meshFile, err))
		}
		mesh.DefaultConfig.fill(env)
	} else if !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, fmt.Errorf("mesh configuration: %w", err))
	}
	return errs
}

func (p *proxyConfig) fill(env map[string]string) {
	set := func(name, value string) {
		if _, have := env[name]; !have {
			env[name] = value
		}
	}
	if p.DiscoveryAddress != nil {
		set("XDS_ADDRESS", *p.DiscoveryAddress)
	}
	if p.ProxyAdminPort != nil {
		set("ADMIN_ADDR", "localhost:"+strconv.Itoa(int(*p.ProxyAdminPort)))
	}
	for _, port := range []*uint16{p.StatusPort, p.StatsPort} {
		if port != nil {
			set("STATS_ADDR", ":"+strconv.Itoa(int(*port)))
		}
	}
	if p.Concurrency != nil {
		set("ZTUNNEL_WORKER_THREADS", strconv.Itoa(int(*p.Concurrency)))
	}
	if p.TerminationDrainDuration != nil {
		set("CONNECTION_TERMINATION_DEADLINE", *p.TerminationDrainDuration)
	}
	for k, v := range p.ProxyMetadata {
		// As in a sidecar's environment: names of variables, mostly ISTIO_META_*.
		set("ISTIO_META_"+strings.TrimPrefix(k, "ISTIO_META_"), v)
	}
}
