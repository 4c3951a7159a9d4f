package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
)

// verifyPages reads the tree of pages of a bbolt file (format 2, unchanged
// since 2013) without bbolt. bbolt believes what it reads: one wrong bit can
// make it panic in a goroutine of its own, follow a circle of pages for ever or
// take all memory. A file that passes here has one tree, in order, whose pages
// are each used once, and a free list of exactly the others.
//
// bbolt writes numbers in the machine's byte order; a store is not moved
// between machines.
func verifyPages(r io.ReaderAt, fileSize int64) error {
	v := &verifier{r: r}
	root, freelist, err := v.meta(fileSize)
	if err != nil {
		return err
	}
	if err := v.tree(root, nil, nil); err != nil {
		return err
	}
	if err := v.free(freelist); err != nil {
		return err
	}
	for id := uint64(2); id < uint64(len(v.used)); id++ {
		if !v.used[id] {
			return fmt.Errorf("page %d is neither used nor free", id)
		}
	}
	return nil
}

const (
	pageSize   = 4096 // of every store, whatever the machine's
	pageHeader = 16   // id u64, flags u16, count u16, overflow u32
	element    = 16   // of a branch or leaf page
	bucketHead = 16   // root page u64, sequence u64

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagFreelist = 0x10
	flagBucket   = 0x01 // of a leaf's element
)

type verifier struct {
	r    io.ReaderAt
	used []bool // by page number
}

// meta chooses the newer of the two valid roots, as bbolt does.
func (v *verifier) meta(fileSize int64) (root, freelist uint64, err error) {
	var newest, pages uint64
	found := false
	for at := int64(0); at < 2*pageSize; at += pageSize {
		b := make([]byte, pageHeader+64)
		if _, err := v.r.ReadAt(b, at); err != nil && err != io.EOF {
			return 0, 0, err
		}
		// magic, version, page size, flags u32; root page, sequence, free list,
		// number of pages, transaction, checksum u64
		m := b[pageHeader:]
		sum := fnv.New64a()
		_, _ = sum.Write(m[:56]) // never fails
		u32, u64 := binary.NativeEndian.Uint32, binary.NativeEndian.Uint64
		if u32(m) != 0xED0CDAED || u32(m[4:]) != 2 || u32(m[8:]) != pageSize || u64(m[56:]) != sum.Sum64() {
			continue
		}
		if tx := u64(m[48:]); !found || tx > newest {
			found, newest = true, tx
			root, freelist, pages = u64(m[16:]), u64(m[32:]), u64(m[40:])
		}
	}
	switch {
	case !found:
		return 0, 0, errors.New("it has no valid root")
	case pages > uint64(fileSize)/pageSize:
		return 0, 0, fmt.Errorf("it is cut short: %d bytes of %d pages", fileSize, pages)
	}
	v.used = make([]bool, max(pages, 2))
	v.used[0], v.used[1] = true, true
	return root, freelist, nil
}

// page reads a page with its overflow and marks it as used.
func (v *verifier) page(id uint64) ([]byte, error) {
	pages := uint64(len(v.used))
	if id >= pages {
		return nil, fmt.Errorf("page %d of %d", id, pages)
	}
	h := make([]byte, pageHeader)
	if _, err := v.r.ReadAt(h, int64(id)*pageSize); err != nil {
		return nil, err
	}
	if got := binary.NativeEndian.Uint64(h); got != id {
		return nil, fmt.Errorf("page %d says it is %d", id, got)
	}
	n := 1 + uint64(binary.NativeEndian.Uint32(h[12:]))
	if n > pages-id {
		return nil, fmt.Errorf("page %d goes on for %d of %d pages", id, n, pages)
	}
	for i := id; i < id+n; i++ {
		if v.used[i] {
			return nil, fmt.Errorf("page %d is used twice", i)
		}
		v.used[i] = true
	}
	b := make([]byte, n*pageSize)
	_, err := v.r.ReadAt(b, int64(id)*pageSize)
	return b, err
}

// tree checks the page and all below it. Keys lie within [from, to); nil is no
// bound.
func (v *verifier) tree(id uint64, from, to []byte) error {
	b, err := v.page(id)
	if err != nil {
		return err
	}
	if binary.NativeEndian.Uint16(b[8:]) == flagBranch {
		return v.branch(id, b, from, to)
	}
	return v.leaf(id, b, from, to)
}

func (v *verifier) branch(id uint64, b, from, to []byte) error {
	n := int(binary.NativeEndian.Uint16(b[10:]))
	if n == 0 {
		return fmt.Errorf("page %d is an empty branch", id)
	}
	keys, children := make([][]byte, n, n+1), make([]uint64, n)
	for i := range n {
		at := pageHeader + i*element
		if at+element > len(b) {
			return fmt.Errorf("page %d has no %d elements", id, n)
		}
		e := b[at:] // position u32, key size u32, page u64
		children[i] = binary.NativeEndian.Uint64(e[8:])
		var err error
		if keys[i], err = span(e, uint64(binary.NativeEndian.Uint32(e)), uint64(binary.NativeEndian.Uint32(e[4:]))); err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
	}
	if err := ordered(keys, from, to); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	keys = append(keys, to)
	for i, child := range children {
		if err := v.tree(child, keys[i], keys[i+1]); err != nil {
			return err
		}
	}
	return nil
}

// leaf checks a leaf page, or the page inside an inline bucket.
func (v *verifier) leaf(id uint64, b, from, to []byte) error {
	if f := binary.NativeEndian.Uint16(b[8:]); f != flagLeaf {
		return fmt.Errorf("page %d is of kind %#x, not part of a tree", id, f)
	}
	n := int(binary.NativeEndian.Uint16(b[10:]))
	keys := make([][]byte, n)
	for i := range n {
		at := pageHeader + i*element
		if at+element > len(b) {
			return fmt.Errorf("page %d has no %d elements", id, n)
		}
		e := b[at:] // flags u32, position u32, key size u32, value size u32
		flags, pos := binary.NativeEndian.Uint32(e), uint64(binary.NativeEndian.Uint32(e[4:]))
		ksize, vsize := uint64(binary.NativeEndian.Uint32(e[8:])), uint64(binary.NativeEndian.Uint32(e[12:]))
		key, err1 := span(e, pos, ksize)
		value, err2 := span(e, pos+ksize, vsize)
		if err := errors.Join(err1, err2); err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
		keys[i] = key
		if flags > flagBucket {
			return fmt.Errorf("page %d: an element of kind %#x", id, flags)
		}
		if flags != flagBucket {
			continue
		}
		if err := v.bucket(id, value); err != nil {
			return err
		}
	}
	if err := ordered(keys, from, to); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

func (v *verifier) bucket(id uint64, value []byte) error {
	if len(value) < bucketHead {
		return fmt.Errorf("page %d: a bucket of %d bytes", id, len(value))
	}
	if root := binary.NativeEndian.Uint64(value); root != 0 {
		return v.tree(root, nil, nil)
	}
	if inline := value[bucketHead:]; len(inline) >= pageHeader {
		return v.leaf(id, inline, nil, nil)
	}
	return fmt.Errorf("page %d: an inline bucket of %d bytes", id, len(value))
}

// free checks that the free list names no page that is used.
func (v *verifier) free(id uint64) error {
	b, err := v.page(id)
	if err != nil {
		return err
	}
	if f := binary.NativeEndian.Uint16(b[8:]); f != flagFreelist {
		return fmt.Errorf("page %d is of kind %#x, not the free list", id, f)
	}
	n, ids := uint64(binary.NativeEndian.Uint16(b[10:])), b[pageHeader:]
	if n == 0xFFFF { // then the first number is the count
		n, ids = binary.NativeEndian.Uint64(ids), ids[8:]
	}
	if n > uint64(len(ids))/8 {
		return fmt.Errorf("page %d has no %d free pages", id, n)
	}
	for i := range n {
		free := binary.NativeEndian.Uint64(ids[8*i:])
		if free >= uint64(len(v.used)) || v.used[free] {
			return fmt.Errorf("page %d is free and used", free)
		}
		v.used[free] = true
	}
	return nil
}

// span is the part of b that an element points to. No element points into the
// page's header or before itself.
func span(b []byte, pos, size uint64) ([]byte, error) {
	if pos < element || pos+size > uint64(len(b)) {
		return nil, fmt.Errorf("an element at %d of %d bytes", pos, size)
	}
	return b[pos : pos+size], nil
}

func ordered(keys [][]byte, from, to []byte) error {
	for i, k := range keys {
		switch {
		case i > 0 && bytes.Compare(keys[i-1], k) >= 0,
			i == 0 && from != nil && bytes.Compare(from, k) > 0,
			to != nil && bytes.Compare(k, to) >= 0:
			return errors.New("its keys are out of order")
		}
	}
	return nil
}
