package hbone

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

// base is what SETTINGS promise to a stream, start what it gets on top unless memory is short.
func (w Windows) base() int { return min(baseWindow, w.Stream) }

func (w Windows) more() int { return min(startWindow, w.Stream) - w.base() }
