// Package chunk owns how a file is cut into chunks and what their hashes are.
//
// A file of n bytes is cut into chunks of [Size] bytes, the last of which may be
// shorter. The chunks are the leaves of the Merkle tree of RFC 6962, section 2.1,
// with SHA-256:
//
//	hash of a chunk = SHA-256(0x00 ‖ chunk)
//	hash of a node  = SHA-256(0x01 ‖ left ‖ right), left over the largest power of two of chunks that is less than all
//
// The root names the file's content as well as its plain SHA-256 does, and lets each
// chunk be checked alone once the list of chunk hashes is here: 32 bytes for each
// chunk, in order, nothing else.
//
// The rule it keeps: a [List] is only made from what hashes to a root, or from the
// file itself. No I/O but reading what it is given.
package chunk

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/resultity/node/internal/digest"
)

// Size is the length of a chunk in bytes. A larger one would lose more to a line
// that is cut, a smaller one make longer lists: this one's is 1/131072 of the file.
const Size = 4 << 20

// HashSize is the length of one chunk's hash.
const HashSize = sha256.Size

var (
	// ErrList says that a list of chunk hashes is not the one that a root names.
	ErrList = errors.New("list of chunk hashes is not the one of this root")
	// ErrChunk says that bytes are not the chunk that a list names.
	ErrChunk = errors.New("chunk has another hash")
)

// Count returns how many chunks a file of size bytes has; size is at least 1.
func Count(size int64) int { return int((size + Size - 1) / Size) }

// Hash returns the hash of one chunk.
func Hash(b []byte) [HashSize]byte {
	h := sha256.New()
	_, _ = h.Write([]byte{0}) // never fails
	_, _ = h.Write(b)
	return [HashSize]byte(h.Sum(nil))
}

// List is the chunk hashes of one file. It is immutable.
type List struct {
	size   int64
	hashes [][HashSize]byte
}

// Parse reads a list for a file of size bytes, which has to have this root. One
// chunk's list is the root itself, so raw may then be empty.
func Parse(raw []byte, size int64, root digest.Digest) (*List, error) {
	n := Count(size)
	if n == 1 && len(raw) == 0 {
		return &List{size, [][HashSize]byte{root.Sum()}}, nil
	}
	if len(raw) != n*HashSize {
		return nil, fmt.Errorf("%w: it has %d bytes, and a file of %d bytes has one of %d", ErrList, len(raw), size, n*HashSize)
	}
	l := &List{size, make([][HashSize]byte, n)}
	for i := range l.hashes {
		l.hashes[i] = [HashSize]byte(raw[i*HashSize:])
	}
	if got := l.Root(); got != root {
		return nil, fmt.Errorf("%w: want %s, got %s", ErrList, root, got)
	}
	return l, nil
}

// Read computes the list of what r brings, and its plain SHA-256, in one pass.
func Read(r io.Reader) (*List, digest.Digest, error) {
	l, whole, b := &List{}, sha256.New(), make([]byte, Size)
	for {
		n, err := io.ReadFull(r, b)
		if n > 0 {
			_, _ = whole.Write(b[:n]) // never fails
			l.size += int64(n)
			l.hashes = append(l.hashes, Hash(b[:n]))
		}
		switch {
		case err == io.EOF || err == io.ErrUnexpectedEOF:
			if l.size == 0 {
				return nil, digest.Digest{}, errors.New("an empty file has no chunks")
			}
			return l, digest.FromSum([sha256.Size]byte(whole.Sum(nil))), nil
		case err != nil:
			return nil, digest.Digest{}, err
		}
	}
}

// Size returns the bytes of the file.
func (l *List) Size() int64 { return l.size }

// Len returns how many chunks there are.
func (l *List) Len() int { return len(l.hashes) }

// Range returns where chunk i begins, and its length.
func (l *List) Range(i int) (off int64, length int) {
	off = int64(i) * Size
	return off, int(min(Size, l.size-off))
}

// Check returns nil if b is chunk i, and [ErrChunk] if not.
func (l *List) Check(i int, b []byte) error {
	if _, n := l.Range(i); n != len(b) || Hash(b) != l.hashes[i] {
		return fmt.Errorf("%w: number %d of %d", ErrChunk, i, len(l.hashes))
	}
	return nil
}

// Bytes returns the form that [Parse] reads.
func (l *List) Bytes() []byte {
	b := make([]byte, 0, len(l.hashes)*HashSize)
	for i := range l.hashes {
		b = append(b, l.hashes[i][:]...)
	}
	return b
}

// Root returns the root of the tree.
func (l *List) Root() digest.Digest { return digest.FromSum(root(l.hashes)) }

func root(hashes [][HashSize]byte) [HashSize]byte {
	if len(hashes) == 1 {
		return hashes[0]
	}
	k := 1
	for k*2 < len(hashes) {
		k *= 2
	}
	left, right := root(hashes[:k]), root(hashes[k:])
	h := sha256.New()
	_, _ = h.Write([]byte{1}) // never fails
	_, _ = h.Write(left[:])
	_, _ = h.Write(right[:])
	return [HashSize]byte(h.Sum(nil))
}
