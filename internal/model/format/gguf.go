package format

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"path"
	"regexp"
	"strconv"
)

// Bounds of a GGUF header. Large models have some thousand tensors, and vocabularies
// of some 100,000 words.
const (
	maxPairs   = 1 << 16
	maxKey     = 1 << 10 // bytes; all of them are kept
	maxTensors = 1 << 20
	maxName    = 1 << 12 // bytes, of a tensor's
	maxString  = 16 << 20
	maxArray   = 1 << 26
	maxNested  = 4
	maxDims    = 4
)

// block is how a type of tensors lays out its numbers: so many of them in so many
// bytes.
type block struct{ numbers, bytes uint64 }

// blocks are those of ggml. One that is not here may be of later.
var blocks = map[uint32]block{
	0: {1, 4}, 1: {1, 2}, 2: {32, 18}, 3: {32, 20}, 6: {32, 22}, 7: {32, 24}, 8: {32, 34}, 9: {32, 36},
	10: {256, 84}, 11: {256, 110}, 12: {256, 144}, 13: {256, 176}, 14: {256, 210}, 15: {256, 292},
	16: {256, 66}, 17: {256, 74}, 18: {256, 98}, 19: {256, 50}, 20: {32, 18}, 21: {256, 110}, 22: {256, 82}, 23: {256, 136},
	24: {1, 1}, 25: {1, 2}, 26: {1, 4}, 27: {1, 8}, 28: {1, 8}, 29: {256, 56}, 30: {1, 2}, 34: {256, 54}, 35: {256, 66}, 39: {32, 17},
}

// Types of values.
const (
	typeString = 8
	typeArray  = 9
)

// widths are the bytes of a value of each other type.
var widths = map[uint32]int64{0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

// gguf reads a header. The first error stays.
type gguf struct {
	r    *bufio.Reader
	at   int64
	size int64
	err  error
}

func (g *gguf) fail(kind error, format string, args ...any) {
	if g.err == nil {
		g.err = fmt.Errorf("%w: at byte %d: "+format, append([]any{kind, g.at}, args...)...)
	}
}

func (g *gguf) read(b []byte) {
	if g.err != nil {
		return
	}
	n, err := io.ReadFull(g.r, b)
	if g.at += int64(n); err != nil {
		g.fail(ErrHeader, "it ends: %w", err)
	}
}

func (g *gguf) u32() uint32 {
	var b [4]byte
	g.read(b[:])
	return binary.LittleEndian.Uint32(b[:])
}

func (g *gguf) u64() uint64 {
	var b [8]byte
	g.read(b[:])
	return binary.LittleEndian.Uint64(b[:])
}

func (g *gguf) skip(n int64) {
	switch {
	case g.err != nil:
	case n > g.size-g.at:
		g.fail(ErrHeader, "%d bytes more, and the file has %d", n, g.size-g.at)
	default:
		for n > 0 && g.err == nil {
			k, err := g.r.Discard(int(min(n, 1<<20)))
			g.at += int64(k)
			if n -= int64(k); err != nil {
				g.fail(ErrHeader, "it ends: %w", err)
			}
		}
	}
}

// text reads a string of at most most bytes that is kept.
func (g *gguf) text(most uint64) string {
	n := g.u64()
	if n > most {
		g.fail(ErrHeader, "a name of %d bytes", n)
		return ""
	}
	b := make([]byte, n)
	g.read(b)
	return string(b)
}

// value skips a value, and returns it if it is a small number.
func (g *gguf) value(kind uint32, depth int) (number uint64) {
	if w, ok := widths[kind]; ok {
		var b [8]byte
		g.read(b[:w])
		return binary.LittleEndian.Uint64(b[:])
	}
	switch kind {
	case typeString:
		n := g.u64()
		if n > maxString {
			g.fail(ErrHeader, "a text of %d bytes", n)
			return 0
		}
		g.skip(int64(n))
	case typeArray:
		of, n := g.u32(), g.u64()
		if depth == 0 || n > maxArray {
			g.fail(ErrHeader, "a list of %d, or too deep", n)
			return 0
		}
		if w, ok := widths[of]; ok {
			g.skip(int64(n) * w)
			return 0
		}
		for ; n > 0 && g.err == nil; n-- {
			g.value(of, depth-1)
		}
	default:
		g.fail(ErrHeader, "a value of type %d", kind)
	}
	return 0
}

var partPattern = regexp.MustCompile(`-([0-9]{5})-of-([0-9]{5})\.gguf$`)

// checkGGUF checks the header, that each tensor lies in the file, and of a part of a
// split file that it is the part that its name says.
func checkGGUF(f File) error {
	g := &gguf{r: bufio.NewReaderSize(io.NewSectionReader(f, 0, f.Size), 64<<10), size: f.Size}
	var magic [4]byte
	if g.read(magic[:]); string(magic[:]) != "GGUF" {
		return fmt.Errorf("%w: it begins with %q", ErrMagic, magic)
	}
	if v := g.u32(); v != 2 && v != 3 {
		return fmt.Errorf("%w: GGUF of version %d, want 2 or 3", ErrHeader, v)
	}
	tensors, pairs := g.u64(), g.u64()
	if tensors > maxTensors || pairs > maxPairs {
		g.fail(ErrHeader, "%d tensors and %d values", tensors, pairs)
	}
	alignment := uint64(32)
	split := map[string]uint64{}
	seen := map[string]bool{}
	for ; pairs > 0 && g.err == nil; pairs-- {
		key := g.text(maxKey)
		if seen[key] {
			g.fail(ErrHeader, "%.80q is given twice", key)
		}
		seen[key] = true
		n := g.value(g.u32(), maxNested)
		switch key {
		case "general.alignment":
			if alignment = n; n == 0 || n > 1<<20 || bits.OnesCount64(n) != 1 {
				g.fail(ErrHeader, "alignment %d", n)
			}
		case "split.no", "split.count":
			split[key] = n
		}
	}
	type extent struct{ begin, size uint64 }
	var all []extent
	for ; tensors > 0 && g.err == nil; tensors-- {
		g.text(maxName)
		dims := g.u32()
		if dims > maxDims {
			g.fail(ErrHeader, "a tensor of %d dimensions", dims)
			break
		}
		numbers := uint64(1)
		for range dims {
			high, low := bits.Mul64(numbers, g.u64())
			if high != 0 {
				g.fail(ErrTensors, "a tensor larger than any file")
			}
			numbers = low
		}
		e := extent{size: 1}
		if b, ok := blocks[g.u32()]; ok {
			high, low := bits.Mul64((numbers+b.numbers-1)/b.numbers, b.bytes)
			if high != 0 || numbers > 1<<62 {
				g.fail(ErrTensors, "a tensor larger than any file")
			}
			e.size = low
		}
		if e.begin = g.u64(); e.begin%alignment != 0 {
			g.fail(ErrTensors, "a tensor begins at %d", e.begin)
		}
		all = append(all, e)
	}
	if g.err != nil {
		return g.err
	}
	start := (uint64(g.at) + alignment - 1) / alignment * alignment
	for i, e := range all {
		if size := uint64(f.Size); start > size || e.begin > size-start || e.size > size-start-e.begin {
			return fmt.Errorf("%w: number %d has %d bytes from %d, and the file %d", ErrTensors, i, e.size, e.begin, f.Size)
		}
	}
	return checkPart(f.Path, split)
}

// checkPart compares the name of a file with the part that it says it is.
func checkPart(name string, split map[string]uint64) error {
	part := partPattern.FindStringSubmatch(path.Base(name))
	if part == nil {
		if split["split.count"] > 1 {
			return fmt.Errorf("%w: it is part %d of %d, and its name does not say so", ErrParts, split["split.no"]+1, split["split.count"])
		}
		return nil
	}
	no, _ := strconv.ParseUint(part[1], 10, 32)
	of, _ := strconv.ParseUint(part[2], 10, 32) // five digits
	if no != split["split.no"]+1 || of != split["split.count"] {
		return fmt.Errorf("%w: it is part %d of %d, and its name says %d of %d", ErrParts, split["split.no"]+1, split["split.count"], no, of)
	}
	return nil
}
