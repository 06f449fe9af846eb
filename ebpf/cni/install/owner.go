package install

import (
	"io/fs"
	"os"
	"syscall"
)

// chown gives f the owner of the file it is going to replace.
func chown(f *os.File, owner fs.FileInfo) error {
	st, ok := owner.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	return f.Chown(int(st.Uid), int(st.Gid))
}
