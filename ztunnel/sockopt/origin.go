package sockopt

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// soOrigin is SO_ORIGIN of ebpf/bpf/mesh.h.
const soOrigin = 0x4d657368

// Origin is who opened a connection that kernel programs captured: struct origin of ebpf/bpf/mesh.h.
type Origin struct {
	Cgroup uint64 // id of the cgroup2 directory, which is its inode number
	PID    uint32 // of the process, in the node's first PID namespace
	_      uint32
	Comm   [16]byte // the thread's name: bytes of the application's choice up to a zero
}

// ReadOrigin reads who opened an accepted connection. Where no such program captured it the error is ENOPROTOOPT.
func ReadOrigin(c Socket, to *Origin) error {
	r := originReaders.Get().(*originReader)
	defer originReaders.Put(r)
	if err := controlSocket(c, r.read); err != nil {
		return err
	}
	if r.err != nil {
		return os.NewSyscallError("getsockopt SO_ORIGIN", r.err)
	}
	*to = r.origin
	return nil
}

// originReader is kept, with its function, since each connection would make one.
type originReader struct {
	origin Origin
	err    error
	read   func(fd uintptr)
}

var originReaders = sync.Pool{New: func() any {
	r := new(originReader)
	r.read = func(fd uintptr) {
		r.err = get(int(fd), unix.SOL_IP, soOrigin, &r.origin)
	}
	return r
}}
