// Package digest owns SHA-256 content names: parsing, printing and checking.
//
// There is one spelling of a digest, "sha256:" and 64 lower-case hexadecimal
// digits. Everything else is refused, so two digests are equal exactly when
// their texts are.
package digest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
)

const prefix = "sha256:"

// ErrMismatch says that bytes are not the ones their digest names.
var ErrMismatch = errors.New("content does not match its digest")

// Digest is the SHA-256 of some content. The zero value names nothing and is
// never the result of Parse or Of. Digests are comparable with ==.
type Digest struct{ sum [sha256.Size]byte }

// Of returns the digest of b.
func Of(b []byte) Digest { return Digest{sha256.Sum256(b)} }

// FromSum makes a digest of an already computed SHA-256.
func FromSum(sum [sha256.Size]byte) Digest { return Digest{sum} }

// Parse reads the one spelling of a digest.
func Parse(s string) (Digest, error) {
	h, ok := strings.CutPrefix(s, prefix)
	if !ok {
		return Digest{}, fmt.Errorf("digest %.80q: must begin with %q", s, prefix)
	}
	d, err := ParseHex(h)
	if err != nil {
		return Digest{}, fmt.Errorf("digest %.80q: %w", s, err)
	}
	return d, nil
}

// ParseHex reads the hexadecimal part alone, as sha256sum prints it.
func ParseHex(h string) (Digest, error) {
	if len(h) != 2*sha256.Size {
		return Digest{}, fmt.Errorf("want %d hexadecimal digits, got %d", 2*sha256.Size, len(h))
	}
	if strings.ToLower(h) != h {
		return Digest{}, errors.New("hexadecimal digits must be lower case")
	}
	var d Digest
	if _, err := hex.Decode(d.sum[:], []byte(h)); err != nil {
		return Digest{}, err
	}
	if d.IsZero() {
		return Digest{}, errors.New("the zero digest names nothing")
	}
	return d, nil
}

// String prints the one spelling; the zero digest prints as "".
func (d Digest) String() string {
	if d.IsZero() {
		return ""
	}
	return prefix + d.Hex()
}

// Hex prints the 64 digits without the algorithm.
func (d Digest) Hex() string { return hex.EncodeToString(d.sum[:]) }

// Short prints the first 12 digits, for people.
func (d Digest) Short() string { return d.Hex()[:12] }

// Sum returns the 32 bytes.
func (d Digest) Sum() [sha256.Size]byte { return d.sum }

// IsZero reports whether d names nothing.
func (d Digest) IsZero() bool { return d.sum == [sha256.Size]byte{} }

// MarshalText implements [encoding.TextMarshaler].
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler]; the empty text is the
// zero digest.
func (d *Digest) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*d = Digest{}
		return nil
	}
	v, err := Parse(string(b))
	if err != nil {
		return err
	}
	*d = v
	return nil
}

// Check fails with [ErrMismatch] unless b is exactly the content d names.
func (d Digest) Check(b []byte) error {
	if got := Of(b); got != d {
		return fmt.Errorf("%w: want %s, got %s", ErrMismatch, d, got)
	}
	return nil
}

// CheckReader reads r to its end and fails with [ErrMismatch] unless it was
// exactly the content d names. It holds one buffer, whatever the size.
func (d Digest) CheckReader(r io.Reader) error {
	h := sha256.New()
	if _, err := io.CopyBuffer(struct{ io.Writer }{h}, r, make([]byte, 1<<20)); err != nil {
		return err
	}
	if got := (Digest{[sha256.Size]byte(h.Sum(nil))}); got != d {
		return fmt.Errorf("%w: want %s, got %s", ErrMismatch, d, got)
	}
	return nil
}
