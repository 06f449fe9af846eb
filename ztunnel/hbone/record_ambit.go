package hbone

import (
	"errors"
	"sync"

	"github.com/ambit-mesh/ambit/ztunnel/record"
)

// straightLimit: parts at least that large become records of their own, sealed from where they lie. Smaller ones are
// first copied together, since a record costs its peer as much as copying them costs us.
const straightLimit = 8 << 10

// ambitRecords is recordConn by our own record layer. Records need not follow frames: frames are one stream of bytes.
type ambitRecords struct {
	g  *gatherConn
	in *record.Opener // owned by the reader

	mu      sync.Mutex
	out     *record.Sealer // guarded by mu
	buf     *gatherBuf     // guarded by mu, and lent until a batch has left
	b       []byte         // of buf: sealed
	pending int            // of buf: plaintext behind b and room for its header
	alert   record.Alert   // guarded by mu: how Close ends
}

func (r *ambitRecords) Buffered() bool { return r.g.whole() }
func (r *ambitRecords) Fill() error    { return r.g.fillRecord() }
func (r *ambitRecords) Cut() error     { return r.g.Conn.Close() }

// Next opens one record where it was read.
func (r *ambitRecords) Next() ([]byte, *block, error) {
	for {
		n, err := r.in.Whole(r.g.unread())
		if err != nil {
			return nil, nil, r.fault(err)
		}
		if n == 0 {
			if err := r.g.fillRecord(); err != nil {
				return nil, nil, err
			}
			continue
		}
		p, err := r.in.Open(r.g.unread()[:n])
		r.g.r += n
		if err != nil {
			return nil, nil, r.fault(err)
		}
		return p, r.g.in, nil
	}
}

// fault notes the alert that the peer is owed.
func (r *ambitRecords) fault(err error) error {
	if e, ok := errors.AsType[*record.Error](err); ok && !e.Remote {
		r.mu.Lock()
		r.alert = e.Alert
		r.mu.Unlock()
	}
	return err
}

func (r *ambitRecords) CanTry() bool { return r.g.raw != nil }

func (r *ambitRecords) WriteBatch(parts []segment) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.dropLocked()
	if err := r.sealBatchLocked(parts); err != nil {
		return err
	}
	return r.flushLocked()
}

func (r *ambitRecords) TryBatch(parts []segment) (left bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.sealBatchLocked(parts); err != nil {
		r.dropLocked()
		return false, err
	}
	n, err := r.g.tryOnce(r.b)
	if r.b = r.b[n:]; err == nil && len(r.b) > 0 {
		return true, nil
	}
	r.dropLocked()
	return false, err
}

func (r *ambitRecords) Flush() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.dropLocked()
	return r.flushLocked()
}

// sealBatchLocked borrows the buffer and leaves the batch's records in it, except those that had to leave for others.
func (r *ambitRecords) sealBatchLocked(parts []segment) error {
	r.buf = gatherBufs.Get().(*gatherBuf)
	r.b, r.pending = r.buf[:0], 0
	for _, part := range parts {
		if len(r.b) > 0 && len(r.b)+r.pending+part.n > tryLimit+gatherSlack { // of TryBatch's never
			if err := r.wholeLocked(); err != nil {
				return err
			}
		}
		if err := r.protectLocked(part.blk.data[:part.n]); err != nil {
			return err
		}
	}
	return r.sealPendingLocked()
}

func (r *ambitRecords) dropLocked() {
	if r.buf != nil {
		gatherBufs.Put(r.buf)
		r.buf, r.b = nil, nil
	}
}

// protectLocked seals p or the records' worth of it, or leaves it pending.
func (r *ambitRecords) protectLocked(p []byte) (err error) {
	for len(p) > 0 {
		straight := len(p) >= straightLimit
		if straight {
			if err := r.sealPendingLocked(); err != nil {
				return err
			}
		}
		if r.pending == 0 {
			if err := r.beginLocked(); err != nil {
				return err
			}
		}
		if straight {
			k := min(len(p), record.MaxPlaintext)
			if r.b, err = r.out.Seal(r.b, p[:k]); err != nil {
				return err
			}
			p = p[k:]
			continue
		}
		lo := len(r.b) + record.HeaderLen + r.pending
		k := copy(r.buf[lo:lo+record.MaxPlaintext-r.pending], p)
		r.pending += k
		p = p[k:]
		if r.pending == record.MaxPlaintext {
			if err := r.sealPendingLocked(); err != nil {
				return err
			}
		}
	}
	return nil
}

// beginLocked makes room for one record, after a KeyUpdate if one is due.
func (r *ambitRecords) beginLocked() (err error) {
	const need = record.UpdateLen + record.Overhead + record.MaxPlaintext
	if len(r.buf)-len(r.b) < need {
		if err := r.flushLocked(); err != nil {
			return err
		}
	}
	if r.out.Due() {
		r.b, err = r.out.SealUpdate(r.b)
	}
	return err
}

// wholeLocked sends what is there, so that a bulk sender's block leaves by itself: it fills its packets (batchFor), and
// a part of the next one behind it would not.
func (r *ambitRecords) wholeLocked() error {
	if err := r.sealPendingLocked(); err != nil {
		return err
	}
	return r.flushLocked()
}

func (r *ambitRecords) sealPendingLocked() (err error) {
	if r.pending == 0 {
		return nil
	}
	lo := len(r.b) + record.HeaderLen
	r.b, err = r.out.Seal(r.b, r.buf[lo:lo+r.pending])
	r.pending = 0
	return err
}

func (r *ambitRecords) flushLocked() error {
	if len(r.b) == 0 {
		return nil
	}
	b := r.b
	r.b = r.buf[:0]
	if r.CanTry() { // what a socket takes at once leaves without the scheduler's knowing: see quick
		n, err := r.g.try(b)
		if err != nil || n == len(b) {
			return err
		}
		b = b[n:]
	}
	_, err := r.g.Conn.Write(b)
	return err
}

// Close sends close_notify, or the alert for what the peer did wrong, and closes the transport.
func (r *ambitRecords) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if last, err := r.out.SealAlert(nil, r.alert); err == nil {
		_, _ = r.g.Conn.Write(last) // the peer may be gone
	}
	return r.g.Conn.Close()
}
