package main

import (
	"embed"
	"slices"
	"strings"
)

//go:embed testdata/*.yaml
var builtin embed.FS

// builtinNames are the manifests that `apply -f NAME` finds without a file.
func builtinNames() []string {
	entries, err := builtin.ReadDir("testdata")
	if err != nil {
		panic("BUG: embedded manifests: " + err.Error())
	}
	var names []string
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), ".yaml"))
	}
	slices.Sort(names)
	return names
}

func builtinManifest(name string) ([]byte, bool) {
	b, err := builtin.ReadFile("testdata/" + strings.TrimSuffix(name, ".yaml") + ".yaml")
	return b, err == nil
}
