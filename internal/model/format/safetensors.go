package format

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"slices"
)

// Bounds of a safetensors header. Of each tensor a name and two numbers are kept, which
// is less than the header has of it.
const (
	maxSafetensorsHeader = 100 << 20 // bytes; the format's own bound
	maxShape             = 64        // dimensions; no library has more
)

// bitsOf are the sizes of the types of tensors.
var bitsOf = map[string]uint64{
	"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
	"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}

type tensor struct {
	Type    string    `json:"dtype"`
	Shape   shape     `json:"shape"`
	Offsets [2]uint64 `json:"data_offsets"`
}

type shape []uint64

// UnmarshalJSON counts before anything is kept: a number of two bytes takes eight.
func (s *shape) UnmarshalJSON(b []byte) error {
	if n := bytes.Count(b, []byte(",")) + 1; n > maxShape {
		return fmt.Errorf("a shape of %d dimensions, at most %d", n, maxShape)
	}
	return json.Unmarshal(b, (*[]uint64)(s))
}

// checkSafetensors checks that the tensors fill the file, from the end of the header
// to the end of the file, none over another, as the format wants it.
func checkSafetensors(f File) error {
	var length [8]byte
	if f.Size < 10 {
		return fmt.Errorf("%w: %d bytes", ErrMagic, f.Size)
	}
	if _, err := f.ReadAt(length[:], 0); err != nil {
		return err
	}
	n := binary.LittleEndian.Uint64(length[:])
	if n < 2 || n > maxSafetensorsHeader || n > uint64(f.Size-8) {
		return fmt.Errorf("%w: a header of %d bytes in a file of %d", ErrHeader, n, f.Size)
	}
	dec := json.NewDecoder(io.NewSectionReader(f, 8, int64(n)))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return fmt.Errorf("%w: the header is no JSON object", ErrMagic)
	}
	seen := map[string]bool{}
	var spans [][2]uint64
	for dec.More() {
		k, err := dec.Token()
		if err != nil {
			return fmt.Errorf("%w: %w", ErrHeader, err)
		}
		name := k.(string) // the syntax allows nothing else
		if seen[name] {
			return fmt.Errorf("%w: tensor %.80q is given twice", ErrHeader, name)
		}
		seen[name] = true
		if name == "__metadata__" {
			if err := skipMetadata(dec); err != nil {
				return fmt.Errorf("%w: metadata: %w", ErrHeader, err)
			}
			continue
		}
		var t tensor
		if err := dec.Decode(&t); err != nil {
			return fmt.Errorf("%w: tensor %.80q: %w", ErrHeader, name, err)
		}
		if err := t.check(); err != nil {
			return fmt.Errorf("tensor %.80q: %w", name, err)
		}
		spans = append(spans, t.Offsets)
	}
	if _, err := dec.Token(); err != nil {
		return fmt.Errorf("%w: %w", ErrHeader, err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return fmt.Errorf("%w: something follows the header's object", ErrHeader)
	}
	slices.SortFunc(spans, func(a, b [2]uint64) int { return cmp.Or(cmp.Compare(a[0], b[0]), cmp.Compare(a[1], b[1])) })
	end := uint64(0)
	for _, s := range spans {
		if s[0] != end {
			return fmt.Errorf("%w: one begins at %d where the one before ends at %d", ErrTensors, s[0], end)
		}
		end = s[1]
	}
	if data := uint64(f.Size-8) - n; end != data {
		return fmt.Errorf("%w: they end at %d, and there are %d bytes of them", ErrTensors, end, data)
	}
	return nil
}

// skipMetadata reads an object of texts, of which nothing is kept.
func skipMetadata(dec *json.Decoder) error {
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return cmp.Or(err, errors.New("it is no object"))
	}
	for text := true; text; {
		t, err := dec.Token() // a name and its value in turn, or the closing bracket
		if err != nil {
			return err
		}
		if _, text = t.(string); !text && t != json.Delim('}') {
			return errors.New("it has something else than texts")
		}
	}
	return nil
}

// check compares a tensor's shape with the bytes that it has.
func (t *tensor) check() error {
	begin, end := t.Offsets[0], t.Offsets[1]
	if begin > end || end > 1<<62 {
		return fmt.Errorf("%w: it is from %d to %d", ErrTensors, begin, end)
	}
	size, ok := bitsOf[t.Type]
	if !ok {
		return nil // a type of later; the engine knows it or refuses it
	}
	for _, d := range t.Shape {
		high, low := bits.Mul64(size, d)
		if high != 0 {
			return fmt.Errorf("%w: its shape is larger than any file", ErrTensors)
		}
		size = low
	}
	if size%8 != 0 || size/8 != end-begin {
		return fmt.Errorf("%w: its shape takes %d bits, and it has %d bytes", ErrTensors, size, end-begin)
	}
	return nil
}
