package blocks

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/minio/highwayhash"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/failpoint"
)

// MendMeta looks at what JetStream has written down of the stream's configuration, and
// mends it: without it the stream is not there. While it is whole, a copy is kept of
// it. What cannot be mended is set aside: whoever makes the stream then has all of its
// messages. It says what was done, if anything was.
func (s *Stream) MendMeta() (done string, err error) {
	name, sumName, copied := filepath.Join(s.Dir, "meta.inf"), filepath.Join(s.Dir, "meta.sum"), filepath.Join(s.Meta, "meta.inf")
	meta, err1 := os.ReadFile(name)
	sum, err2 := os.ReadFile(sumName)
	spare, err3 := os.ReadFile(copied)
	for _, err := range []error{err1, err2, err3} {
		if ignore(err, fs.ErrNotExist) != nil {
			return "", err
		}
	}
	key := sha256.Sum256([]byte(filepath.Base(s.Dir)))
	of := func(b []byte) []byte {
		var sum [sumSize]byte
		h, _ := highwayhash.New64(key[:]) // fails for another length of the key only
		_, _ = h.Write(b)                 // never fails
		return hex.AppendEncode(nil, h.Sum(sum[:0]))
	}
	if err1 == nil && bytes.Equal(of(meta), sum) {
		if bytes.Equal(meta, spare) {
			return "", nil
		}
		// On a full disk the next start makes the copy: nothing is wrong with the stream.
		return "", ignore(s.keep(copied, meta), syscall.ENOSPC)
	}
	whole := func(b []byte) bool {
		var v struct{ Name string }
		return json.Unmarshal(b, &v) == nil && v.Name == filepath.Base(s.Dir)
	}
	switch {
	case err3 == nil && bytes.Equal(of(spare), sum): // what there was when the sum was written
		meta, done = spare, "restored"
	case err1 == nil && err2 == nil && near(of(meta), sum) && whole(meta):
		done = "mended"
	default:
		if meta = changedByte(meta, func(b []byte) bool { return bytes.Equal(of(b), sum) }); meta != nil {
			done = "mended"
		} else if err3 == nil && whole(spare) {
			meta, done = spare, "restored from an older copy"
		} else {
			aside := os.Rename(name, name+".damaged")
			return "made anew", errors.Join(ignore(aside, fs.ErrNotExist), durable.SyncDir(s.Dir))
		}
	}
	return done, errors.Join(Write(name, meta), Write(sumName, of(meta)), s.keep(copied, meta))
}

// keep writes a copy.
func (s *Stream) keep(name string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	if err := Write(name, b); err != nil || s.kept == nil {
		return err
	}
	return s.kept()
}

// Write makes b durable under a name: what is under names here is whole at any moment.
func Write(name string, b []byte) error {
	failpoint.Here("blocks.write.begin")
	return durable.WriteFile(name, b, 0o600)
}

// near says that all but one byte is the same.
func near(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	n := 0
	for i := range a {
		if a[i] != b[i] {
			n++
		}
	}
	return n <= 1
}

// longestMeta bounds what is tried.
const longestMeta = 4 << 10

// changedByte finds the one byte with whose change b is right, and returns that, or nil.
func changedByte(b []byte, right func([]byte) bool) []byte {
	if len(b) > longestMeta {
		return nil
	}
	for i, was := range b {
		for x := 1; x < 256; x++ {
			if b[i] = was ^ byte(x); right(b) {
				return b
			}
		}
		b[i] = was
	}
	return nil
}
