package model

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"os"
	"path"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/digest"
)

// Where the file system has fs-verity (ext4 and f2fs with their feature, btrfs), a
// verified file is sealed: the kernel keeps the hashes of its blocks, lets nobody write
// to it, and compares every block that it reads from the disk from then on. A byte that
// has changed is an error of reading then, at an engine's first look at it, and not a
// wrong answer until the next scrub. The kernel's digest of the file is computed here as
// the file arrives, from the bytes that were verified, and kept beside it, so that
// another file in its place is noticed without reading it. Everywhere else nothing is
// sealed, and nothing missed but that.

// sealed is the suffix of the file with the kernel's digest of a blob.
const sealed = ".verity"

// seals is the kernel's part of fs-verity.
type seals interface {
	// enable seals a file that is open for reading, and for writing nowhere. It takes
	// about as long as reading it.
	enable(f *os.File) error
	// measure returns the digest of a sealed file; [unix.ENODATA] for one that is not
	// sealed, and another error where the file system cannot do it.
	measure(f *os.File) (digest.Digest, error)
}

// fsVerity is the kernel's.
type fsVerity struct{}

const verityBlock = 4096 // bytes that are hashed together

func (fsVerity) enable(f *os.File) error {
	arg := struct {
		version, algorithm, blockSize, saltSize uint32
		salt                                    uint64
		sigSize, _                              uint32
		sig                                     uint64
		_                                       [11]uint64
	}{version: 1, algorithm: unix.FS_VERITY_HASH_ALG_SHA256, blockSize: verityBlock}
	return ioctl(f, unix.FS_IOC_ENABLE_VERITY, unsafe.Pointer(&arg))
}

func (fsVerity) measure(f *os.File) (digest.Digest, error) {
	arg := struct {
		algorithm, size uint16
		digest          [sha256.Size]byte
	}{size: sha256.Size}
	if err := ioctl(f, unix.FS_IOC_MEASURE_VERITY, unsafe.Pointer(&arg)); err != nil {
		return digest.Digest{}, err
	}
	if arg.algorithm != unix.FS_VERITY_HASH_ALG_SHA256 || arg.size != sha256.Size {
		return digest.Digest{}, fmt.Errorf("sealed with algorithm %d", arg.algorithm)
	}
	return digest.FromSum(arg.digest), nil
}

func ioctl(f *os.File, request uint, arg unsafe.Pointer) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var errno unix.Errno
	err = c.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, uintptr(request), uintptr(arg))
	})
	if err == nil && errno != 0 {
		err = errno
	}
	return err
}

// canSeal reports whether files beside f can be sealed.
func (s *Store) canSeal(f *os.File) bool {
	_, err := s.seals.measure(f)
	return errors.Is(err, unix.ENODATA)
}

// seal seals a blob that has just been verified, whose digest is want by the kernel's
// counting. Where that cannot be done the file is as good as on other file systems. If
// the disk gave other bytes back than were written, it is [digest.ErrMismatch]. The
// caller has the blob's lock.
func (s *Store) seal(ctx context.Context, file, want digest.Digest) error {
	f, err := s.Open(file)
	if err != nil {
		return err
	}
	defer f.Close() // read only: nothing can be lost
	err = s.seals.enable(f)
	var got digest.Digest
	if err == nil || errors.Is(err, unix.EEXIST) {
		got, err = s.seals.measure(f)
	}
	switch {
	case err == nil && got == want:
		// What is cut short is found out when it is read.
		err = s.root.WriteFile(path.Join(blobs, file.Hex())+sealed, []byte(want.Hex()), 0o600)
	case err == nil, errors.Is(err, unix.EIO):
		if err := s.inspect(ctx, file); err != nil {
			return err
		}
		err = errors.Join(err, fmt.Errorf("the kernel's digest is %s instead of %s", got, want))
	}
	if err != nil {
		s.log.WarnContext(ctx, "a model file is verified and not sealed", "sha256", file.Hex(), "error", err)
	}
	return nil
}

// unbroken fails with [digest.ErrMismatch] if a blob that was sealed is another file
// now, and not the same bytes again; it has lost its name then. It reads nothing of one
// whose seal is whole. The caller has the blob's lock.
func (s *Store) unbroken(ctx context.Context, file digest.Digest) error {
	name := path.Join(blobs, file.Hex())
	raw, err := s.root.ReadFile(name + sealed)
	if err != nil {
		return nil // it was never sealed
	}
	want, err := digest.ParseHex(strings.TrimSpace(string(raw)))
	if err == nil {
		f, err := s.Open(file)
		if err != nil {
			return err
		}
		got, err := s.seals.measure(f)
		_ = f.Close() // read only: nothing can be lost
		if err == nil && got == want {
			return nil
		}
	}
	// A copy of the store has the files and not their seals.
	s.log.WarnContext(ctx, "a model file has lost its seal and is read again", "sha256", file.Hex())
	return errors.Join(s.inspect(ctx, file), s.root.Remove(name+sealed))
}

// verityHash computes the digest that the kernel gives to a sealed file, as
// Documentation/filesystems/fsverity.rst of Linux has it: SHA-256 of a descriptor with
// the size and the root of a tree of hashes, 128 to a block, each over a whole block,
// filled up with zeros. It is an [io.Writer] that never fails.
type verityHash struct {
	size   uint64
	levels [][]byte // of each, what fills no block yet; the first has the file's own bytes
	h      hash.Hash
}

func newVerityHash() *verityHash {
	return &verityHash{levels: make([][]byte, 1), h: sha256.New()}
}

// Write implements [io.Writer].
func (v *verityHash) Write(b []byte) (n int, err error) {
	v.size += uint64(len(b))
	for n = len(b); len(b) > 0; {
		if len(v.levels[0]) == 0 && len(b) > verityBlock { // without a copy; there is more
			v.add(1, v.block(b[:verityBlock]))
			b = b[verityBlock:]
			continue
		}
		if len(v.levels[0]) == verityBlock {
			v.flush(0)
		}
		k := min(verityBlock-len(v.levels[0]), len(b))
		v.levels[0] = append(v.levels[0], b[:k]...)
		b = b[k:]
	}
	return n, nil
}

// add puts a hash at the end of a level. A block is hashed only once there is more
// than that: the last one of all is the root.
func (v *verityHash) add(level int, sum []byte) {
	if level == len(v.levels) {
		v.levels = append(v.levels, nil)
	}
	if len(v.levels[level]) == verityBlock {
		v.flush(level)
	}
	v.levels[level] = append(v.levels[level], sum...)
}

func (v *verityHash) flush(level int) {
	sum := v.block(v.levels[level])
	v.levels[level] = v.levels[level][:0]
	v.add(level+1, sum)
}

var zeros [verityBlock]byte

func (v *verityHash) block(b []byte) []byte {
	v.h.Reset()
	_, _ = v.h.Write(b) // never fails
	_, _ = v.h.Write(zeros[len(b):])
	return v.h.Sum(nil)
}

// sum returns the digest; nothing may be written afterwards.
func (v *verityHash) sum() digest.Digest {
	var descriptor [256]byte
	descriptor[0], descriptor[1], descriptor[2] = 1, unix.FS_VERITY_HASH_ALG_SHA256, 12 // version; 2¹² is a block
	binary.LittleEndian.PutUint64(descriptor[8:], v.size)
	if v.size > 0 {
		for level := 0; level+1 < len(v.levels); level++ {
			v.flush(level)
		}
		copy(descriptor[16:], v.block(v.levels[len(v.levels)-1]))
	}
	return digest.Of(descriptor[:])
}
