package flow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// logbook is what a table has logged.
type logbook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// take returns the lines since the last call.
func (l *logbook) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := strings.Split(strings.TrimSuffix(l.b.String(), "\n"), "\n")
	l.b.Reset()
	if len(out) == 1 && out[0] == "" {
		return nil
	}
	return out
}

func (l *logbook) logger(level string) *slog.Logger {
	log, _ := boot.NewLogger(l, "text", level)
	return boot.Scoped(log, "access")
}

var src = &mesh.Workload{UID: "a", Name: "a-5b7-x", WorkloadName: "a", Traits: &mesh.Traits{Namespace: "shop", Identity: peer}}

// refused is one failed outbound connection.
func refused(t *testing.T, table *Table, rec Record, err error) {
	t.Helper()
	c, _ := table.Begin(t.Context(), rec)
	c.Describe()
	c.End(err)
}

// TestIdenticalRefusalsAreSummed: the first is told at once, the others once
// an interval, and none is lost.
func TestIdenticalRefusalsAreSummed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var book logbook
		table := New(Config{View: func() *store.View { return view(1, dst) }, Logger: book.logger("info")})
		ctx, stop := context.WithCancel(t.Context())
		donec := make(chan error, 1)
		go func() { donec <- table.Run(ctx) }()
		rec := Record{Direction: Outbound, Pod: "a", Src: src, Dst: dst, Transport: HBONE, HBONEAddr: "10.0.0.2:80", DstAddr: netip.MustParseAddrPort("10.0.0.2:15008")}
		deny := &hbone.StatusError{Code: 401}

		refused(t, table, rec, deny)
		if got := book.take(); len(got) != 1 || strings.Contains(got[0], "count=") || !strings.Contains(got[0], `reason="policy"`) {
			t.Fatalf("first: %q", got)
		}
		for range 1000 {
			refused(t, table, rec, deny)
		}
		refused(t, table, rec, nil)
		refused(t, table, rec, nil)
		if got := book.take(); len(got) != 2 || !strings.Contains(got[0], "\tinfo\t") {
			t.Fatalf("only the two that went well have lines of their own: %q", got)
		}
		time.Sleep(10*time.Second + time.Millisecond)
		synctest.Wait()
		if got := book.take(); len(got) != 1 || !strings.Contains(got[0], "count=1000") || !strings.Contains(got[0], "\terror\t") {
			t.Fatalf("after an interval: %q", got)
		}
		// Still within the interval of the sum.
		refused(t, table, rec, deny)
		if got := book.take(); got != nil {
			t.Fatalf("right after a sum: %q", got)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got := book.take(); len(got) != 1 || strings.Contains(got[0], "count=") {
			t.Fatalf("one refusal is no sum: %q", got)
		}
		time.Sleep(10 * time.Second)
		refused(t, table, rec, deny)
		if got := book.take(); len(got) != 1 {
			t.Fatalf("after an interval of silence: %q", got)
		}
		// What is held back at the end is told at the end.
		refused(t, table, rec, deny)
		refused(t, table, rec, deny)
		stop()
		if err := <-donec; err != nil {
			t.Fatal(err)
		}
		if got := book.take(); len(got) != 1 || !strings.Contains(got[0], "count=2") {
			t.Fatalf("at the end: %q", got)
		}
		rows := table.Refusals()
		if len(rows) != 1 || rows[0].Count != 1005 || rows[0].Source != "shop/a" || rows[0].Destination != "default/b:80" || rows[0].Reason != ReasonPolicy {
			t.Errorf("%+v", rows)
		}
	})
}

// TestPeersCannotFillLogOrMemory: whatever a pod's peers invent, memory and
// lines are bounded, every refusal is counted, and others keep theirs.
func TestPeersCannotFillLogOrMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var book logbook
		table := New(Config{Logger: book.logger("info")})
		bad := Failed(ReasonTLS, errors.New("no"))
		table.Refuse(Record{Direction: Inbound, Pod: "quiet", SrcAddr: netip.MustParseAddrPort("10.9.9.9:1")}, bad)
		addr := netip.MustParseAddr("10.1.0.0")
		const n = 10_000
		for range n {
			addr = addr.Next()
			table.Refuse(Record{Direction: Inbound, Pod: "attacked", SrcAddr: netip.AddrPortFrom(addr, 1),
				HBONEAddr: strings.Repeat("x", 60<<10) + addr.String()}, bad)
		}
		if got := len(book.take()); got != 1+maxPodGroups+1 {
			t.Errorf("%d lines", got)
		}
		var attacked uint64
		for _, r := range table.Refusals() {
			if r.Pod == "attacked" {
				attacked += r.Count
			}
			if len(r.Destination) > maxName+8 || len(r.Example.Error) > maxError+8 {
				t.Errorf("unbounded row: %d, %d bytes", len(r.Destination), len(r.Example.Error))
			}
		}
		if rows := table.Refusals(); len(rows) != maxPodGroups+2 || attacked != n || rows[len(rows)-1].Pod != "quiet" {
			t.Errorf("%d rows, %d counted of %d", len(rows), attacked, n)
		}
		// Many pods at once: the node's bound.
		for pod := range 100 {
			for range 40 {
				addr = addr.Next()
				table.Refuse(Record{Direction: Inbound, Pod: fmt.Sprint("p", pod), SrcAddr: netip.AddrPortFrom(addr, 1)}, bad)
			}
		}
		var total uint64
		rows := table.Refusals()
		for _, r := range rows {
			total += r.Count
		}
		if len(rows) > maxGroups+2 || total != 1+n+4000 {
			t.Errorf("%d rows, %d counted", len(rows), total)
		}
		// What is old makes room for what is met now, and its sum is not lost.
		book.take()
		time.Sleep(time.Minute)
		table.Refuse(Record{Direction: Inbound, Pod: "later", SrcAddr: netip.MustParseAddrPort("10.9.9.8:1")}, bad)
		if rows := table.Refusals(); rows[0].Pod != "later" || len(rows) > maxGroups+2 {
			t.Errorf("%d rows, first %+v", len(rows), rows[0])
		}
		for _, s := range table.refusals.due(time.Now()) {
			if s.count == 0 || s.conn == nil {
				t.Errorf("empty sum %+v", s)
			}
		}
	})
}

// TestOtherCausesAreOtherRefusals: another policy, another fault of a
// certificate is told at once.
func TestOtherCausesAreOtherRefusals(t *testing.T) {
	var book logbook
	table := New(Config{Logger: book.logger("info")})
	for _, err := range []error{
		&DenyError{Reason: "policy x/y rule 1"}, &DenyError{Reason: "policy x/z rule 1"}, &DenyError{Reason: "policy x/y rule 1"},
		&cert.VerifyError{Reason: "no certificate"}, &cert.VerifyError{Peer: "spiffe://x", Reason: "not a workload identity"},
	} {
		table.Refuse(Record{Direction: Inbound, Dst: dst}, err)
	}
	if got := book.take(); len(got) != 4 {
		t.Errorf("%q", got)
	}
	if rows := table.Refusals(); len(rows) != 4 || rows[0].Why == "" {
		t.Errorf("%+v", rows)
	}
}

// TestEvictedGroupsTellTheirSum: what was held back by a group that makes room
// is written then.
func TestEvictedGroupsTellTheirSum(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var book logbook
		table := New(Config{Logger: book.logger("info")})
		from := func(i int) Record {
			return Record{Direction: Inbound, Pod: "p", SrcAddr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 1)}
		}
		bad := Failed(ReasonTLS, errors.New("no"))
		for i := range maxPodGroups {
			table.Refuse(from(i), bad)
			table.Refuse(from(i), bad)
		}
		book.take()
		time.Sleep(time.Hour)
		table.Refuse(from(200), bad)
		if got := book.take(); len(got) != 2 || !strings.Contains(got[0], "src.addr=10.0.0.0:1") {
			t.Errorf("%q", got)
		}
	})
}

// TestResetsAreToldAndNoFailure: an end of a live connection may reset it, in a
// loop if it likes.
func TestResetsAreToldAndNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var book logbook
		table := New(Config{Logger: book.logger("info")})
		for range 100 {
			c, _ := table.Begin(t.Context(), Record{Direction: Inbound, Pod: "b", Dst: dst})
			c.Describe()
			c.Stats.Sent.Store(3)
			c.Stats.Received.Store(5)
			c.End(&relay.Error{Side: "a", Op: "read", Err: &hbone.ResetError{Code: hbone.CodeCancel, Remote: true}})
		}
		got := book.take()
		if len(got) != 1 || !strings.Contains(got[0], "\tinfo\taccess\tconnection complete\t") || !strings.HasSuffix(got[0], `reason="reset" reset_by="src"`) {
			t.Errorf("%q", got)
		}
		if rows := table.Refusals(); len(rows) != 0 {
			t.Errorf("nobody refused: %+v", rows)
		}
		table.writeSums()
		if got := book.take(); len(got) != 1 || !strings.HasSuffix(got[0], " count=99") || !strings.Contains(got[0], " bytes_sent=495 bytes_recv=297 ") {
			t.Errorf("no byte is lost to the sum: %q", got)
		}
	})
}

func TestAccessLogModes(t *testing.T) {
	const all, failures, off = ambit.WorkloadExtension_ACCESS_LOG_ALL, ambit.WorkloadExtension_ACCESS_LOG_FAILURES, ambit.WorkloadExtension_ACCESS_LOG_OFF
	with := func(m ambit.WorkloadExtension_AccessLog) *mesh.Workload {
		w := dst.Copy()
		w.AccessLog = m
		return w
	}
	for _, c := range []struct {
		name          string
		rec           Record
		clean, failed int
	}{
		{"all", Record{Direction: Inbound, Dst: with(all)}, 1, 1},
		{"failures", Record{Direction: Inbound, Dst: with(failures)}, 0, 1},
		{"off", Record{Direction: Inbound, Dst: with(off)}, 0, 0},
		{"the peer's mode is not ours, inbound", Record{Direction: Inbound, Dst: with(all), Src: with(off)}, 1, 1},
		{"the peer's mode is not ours, outbound", Record{Direction: Outbound, Dst: with(off), Src: with(all)}, 1, 1},
		{"outbound", Record{Direction: Outbound, Dst: with(all), Src: with(failures)}, 0, 1},
		{"workload not known", Record{Direction: Inbound}, 1, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			var book logbook
			table := New(Config{Logger: book.logger("debug")})
			refused(t, table, c.rec, nil)
			if got := book.take(); len(got) != 2*c.clean { // opened and complete
				t.Errorf("clean: %q", got)
			}
			refused(t, table, c.rec, Failed(ReasonAppRefused, errors.New("no")))
			if got := book.take(); len(got) != c.clean+c.failed {
				t.Errorf("failed: %q", got)
			}
			if len(table.Refusals()) != 1 {
				t.Error("a refusal counts, whether it is logged or not")
			}
		})
	}
}

func TestRefusalsAsText(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var b strings.Builder
	if err := WriteRefusals(&b, []Refusal{
		{Reason: ReasonPolicy, Direction: Inbound, Source: "shop/a", Destination: "default/b:80", Count: 12, First: at, Last: at.Add(time.Hour),
			Example: Example{TraceID: goodID, Error: "denied"}},
		{Reason: ReasonBadRequest, Direction: Inbound, Source: "10.0.0.1", Destination: "evil\n\x1b[31m", Count: 1, First: at, Last: at},
	}); err != nil {
		t.Fatal(err)
	}
	want := `COUNT  REASON       DIRECTION  SOURCE    DESTINATION       FIRST                 LAST                  TRACE ID                          EXAMPLE
12     policy       inbound    shop/a    default/b:80      2026-01-02T03:04:05Z  2026-01-02T04:04:05Z  ` + goodID + `  denied
1      bad_request  inbound    10.0.0.1  "evil\n\x1b[31m"  2026-01-02T03:04:05Z  2026-01-02T03:04:05Z                                    
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestLoggingNeverDelaysTraffic: with nobody reading the log, connections end
// as ever; what was lost is counted, and told when somebody reads again.
func TestLoggingNeverDelaysTraffic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &stuck{openc: make(chan struct{})}
		q := boot.NewQueue(w, 4<<10)
		log, _ := boot.NewLogger(q, "text", "debug")
		table := New(Config{Logger: boot.Scoped(log, "access")})
		begin := time.Now()
		for i := range 1000 {
			var err error
			if i%2 == 1 {
				err = Failed(ReasonAppRefused, errors.New("no"))
			}
			refused(t, table, Record{Direction: Inbound, Pod: fmt.Sprint(i % 7), Dst: dst}, err)
		}
		if time.Since(begin) != 0 {
			t.Errorf("connections waited %v for the log", time.Since(begin))
		}
		if q.Dropped() == 0 {
			t.Error("the queue was meant to overflow")
		}
		close(w.openc)
		time.Sleep(time.Second) // of the bubble: lines gather before they are written, and there are two rounds to go
		synctest.Wait()
		if got := w.String(); !strings.Contains(got, "\twarn\tlog\tlog lines dropped\tcount="+fmt.Sprint(q.Dropped())) {
			t.Errorf("the loss of %d lines is not told: ...%s", q.Dropped(), got[max(0, len(got)-300):])
		}
		_ = q.Close()
	})
}

// stuck is an output that nobody reads until openc closes.
type stuck struct {
	openc chan struct{}
	logbook
}

func (s *stuck) Write(p []byte) (int, error) {
	<-s.openc
	return s.logbook.Write(p)
}

func (s *stuck) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
