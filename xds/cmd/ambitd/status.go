package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/xds/app"
)

// statusTimeout is more than a process takes that can answer at all.
const statusTimeout = 5 * time.Second

// statusCommand prints a running ambitd's status: 0 all is in force, 1 there
// are problems, 2 it cannot be asked.
func statusCommand(args []string, stdout, stderr io.Writer) error {
	set := flag.NewFlagSet("ambitd status", flag.ContinueOnError)
	addr := set.String("addr", "http://localhost:15014", "monitoring address of the ambitd to ask")
	format := set.String("o", "text", "text or json")
	if err := parse(set, args, stderr); err != nil {
		return &exitError{2, err}
	}
	if *format != "text" && *format != "json" {
		return &exitError{2, fmt.Errorf("status: -o %q: one of text, json", *format)}
	}
	ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
	defer cancel()
	s, body, err := fetchStatus(ctx, *addr)
	if err != nil {
		return &exitError{2, fmt.Errorf("%w (is it running? --addr gives its monitoring address)", err)}
	}
	if *format == "json" {
		_, err = stdout.Write(body)
	} else {
		err = s.WriteText(stdout, time.Now())
	}
	if err == nil && !s.Healthy() {
		return &exitError{code: 1}
	}
	return err
}

func fetchStatus(ctx context.Context, addr string) (*app.Status, []byte, error) {
	if !strings.Contains(addr, "://") {
		addr = "http://" + addr
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(addr, "/")+"/status", nil)
	if err != nil {
		return nil, nil, fmt.Errorf("status: %w", err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, nil, fmt.Errorf("status: %w", err)
	}
	defer resp.Body.Close() // read to the end or given up
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return nil, nil, fmt.Errorf("status: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, nil, fmt.Errorf("status: %s answered %s", addr, resp.Status)
	}
	var s app.Status
	if err := json.Unmarshal(body, &s); err != nil {
		return nil, nil, fmt.Errorf("status: %s is not an ambitd: %w", addr, err)
	}
	return &s, body, nil
}
