package app

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/ambit-mesh/ambit/test/lab/wire"
)

// captured is the last line of `capture -o json`.
type captured struct {
	Watched int          `json:"watched"` // namespaces, also of pods that came and went
	Dropped int          `json:"dropped"` // SYNs that the kernel had no room for
	Starts  []wire.Count `json:"starts"`
}

// capture watches every interface of the lab but loopback for connections that
// begin, until it is told to end or for as long as it was told to last. The first
// line says that it watches.
func (c *call) capture(ctx context.Context) (int, error) {
	if t := c.Flags["timeout"]; t != "" {
		d, err := time.ParseDuration(t)
		if err != nil {
			return 2, fmt.Errorf("--timeout: %w", err)
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	asJSON := c.Flags["output"] == "json"
	log := wire.NewLog(func(s wire.Start) {
		if !asJSON {
			c.w.Printf("%s\n", s)
		}
	})
	var sum captured
	watchers := map[types.UID]*wire.Watcher{}
	for _, h := range c.app.net.Hosts() {
		w, err := log.Watch(h)
		if err != nil {
			return 1, err
		}
		defer w.Close() // once more; it counts after an error above
		watchers[types.UID(h.Name)] = w
		sum.Watched++
	}
	err := c.watchPods(ctx, log, watchers, &sum.Watched, func() {
		c.w.Printf("watching every interface of %d namespaces for connections that begin\n", sum.Watched)
	})
	for _, w := range watchers {
		err = errors.Join(err, w.Close())
	}
	if err != nil {
		return 1, err
	}
	sum.Starts, sum.Dropped = log.Counts()
	if asJSON {
		b, err := json.Marshal(sum)
		if err != nil {
			return 1, err
		}
		c.w.Printf("%s\n", b)
		return 0, nil
	}
	c.w.Printf("%d namespaces watched, %d kinds of start seen, %d packets lost\n", sum.Watched, len(sum.Starts), sum.Dropped)
	return 0, nil
}

// watchPods keeps a watcher in each pod's namespace until ctx ends or a signal
// comes. A pod that comes later is seen at its node's end of the cable from its
// first packet on.
func (c *call) watchPods(ctx context.Context, log *wire.Log, watchers map[types.UID]*wire.Watcher, watched *int, ready func()) error {
	wakec, stop := c.app.store.Watch()
	defer stop()
	pods := map[types.UID]bool{}
	for {
		now := c.app.kubelet.Hosts()
		for uid, h := range now {
			if pods[uid] {
				continue
			}
			w, err := log.Watch(h)
			if err != nil {
				continue // it went meanwhile
			}
			watchers[uid], pods[uid] = w, true
			*watched++
		}
		for uid := range pods {
			if now[uid] == nil {
				if err := watchers[uid].Close(); err != nil {
					return err
				}
				delete(watchers, uid)
				delete(pods, uid)
			}
		}
		if ready != nil {
			ready()
			ready = nil
		}
		select {
		case <-wakec:
		case <-c.signals:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}
