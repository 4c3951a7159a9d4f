// Package durable writes files that are either old or new after a crash, and reads
// files within bounds.
//
// The rules it keeps: a file under its final name is whole and on disk: written beside
// it, synced, renamed, and the directory synced. A torn write is never visible. What
// is read has a bound, which the error of a longer file names.
package durable

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/resultity/node/internal/failpoint"
)

// WriteFile replaces name with data and mode.
//
// System calls, in order: open(name.tmp*, O_CREAT|O_EXCL), fchmod, write,
// fsync, close, rename(tmp, name), open(dir), fsync(dir). On an error the old
// content of name stays and the temporary file is removed.
func WriteFile(name string, data []byte, mode fs.FileMode) (err error) {
	dir := filepath.Dir(name)
	f, err := os.CreateTemp(dir, filepath.Base(name)+".tmp*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()           // the error that brought us here says more
			_ = os.Remove(f.Name()) // a leftover is harmless: it never has the final name
		}
	}()
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	failpoint.Here("durable.write.synced")
	if err := os.Rename(f.Name(), name); err != nil {
		return err
	}
	failpoint.Here("durable.write.renamed")
	return SyncDir(dir)
}

// SyncDir makes renames, creations and removals in dir survive a power cut.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	if err := d.Sync(); err != nil {
		_ = d.Close() // the sync error says more
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return d.Close()
}
