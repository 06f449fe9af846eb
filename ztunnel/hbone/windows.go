package hbone

import "github.com/ambit-mesh/ambit/ztunnel/ledger"

// Windows are the flow-control limits that we give to peers. Zero values are the reference's: 4 MiB, 16 MiB, 1 MiB.
//
// A stream does not start with its largest window but grows to it while its reader keeps up, so Stream is a bound and
// not what each stream costs.
type Windows struct {
	Stream     int // largest window of a stream, at least 65535
	Connection int // of all streams of a tunnel together
	Frame      int // SETTINGS_MAX_FRAME_SIZE, 16384 to 16777215
}

func (w Windows) withDefaults() Windows {
	if w.Stream == 0 {
		w.Stream = largestWindow
	}
	if w.Connection == 0 {
		w.Connection = connWindow
	}
	if w.Frame == 0 {
		w.Frame = ourMaxFrame
	}
	w.Stream = max(w.Stream, defaultWindow)
	w.Connection = max(w.Connection, defaultWindow)
	return w
}

// base is what SETTINGS promise to a stream, of which nobody asks the ledger.
func (w Windows) base() int { return min(baseWindow, w.Stream) }

// start is what a stream begins with unless memory is short.
func (w Windows) start() int { return min(startWindow, w.Stream) }

// bind has the tunnel's streams ask account for what they hold. Where the node's memory is limited they are promised less:
// what is in flight to those of which nobody reads must fit it, all together, and who is read asks for more soon.
func (t *tunnel) bind(account *ledger.Account) {
	t.account = account
	if n := account.Unasked(); n > 0 {
		t.scarce = true
		t.base = min(t.base, int(min(n, maxWindow)))
	}
}

// overdraft is by how much a peer may exceed a stream's window as long as it has not acknowledged what we promise: until
// then it goes by the protocol's default, which may be more
// (https://www.rfc-editor.org/rfc/rfc9113#section-6.9.3). The connection's window is the default as long, too, so that all
// its streams together exceed theirs by no more.
func (t *tunnel) overdraft() int {
	if t.acknowledged.Load() {
		return 0
	}
	return max(0, defaultWindow-t.base)
}
