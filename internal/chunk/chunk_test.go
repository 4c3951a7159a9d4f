package chunk

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"testing"

	"github.com/resultity/node/internal/digest"
)

// listOf makes a list of these leaves, whatever their length.
func listOf(leaves ...string) *List {
	l := &List{}
	for _, s := range leaves {
		b, err := hex.DecodeString(s)
		if err != nil {
			panic(err)
		}
		l.hashes = append(l.hashes, Hash(b))
	}
	return l
}

// TestRootsOfCertificateTransparency takes the trees that implementations of RFC
// 6962 test each other with.
func TestRootsOfCertificateTransparency(t *testing.T) {
	leaves := []string{"", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"}
	roots := []string{
		"6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
		"fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
		"aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
		"d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
		"4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
		"76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
		"ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
		"5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
	}
	for i, want := range roots {
		if got := listOf(leaves[:i+1]...).Root().Hex(); got != want {
			t.Errorf("%d leaves: %s, want %s", i+1, got, want)
		}
	}
}

func content(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i ^ i>>8 ^ i>>16)
	}
	return b
}

func TestReadAndParse(t *testing.T) {
	for _, n := range []int{1, Size - 1, Size, Size + 1, 3*Size + 5} {
		b := content(n)
		l, sum, err := Read(bytes.NewReader(b))
		if err != nil || sum != digest.Of(b) || l.Len() != Count(int64(n)) || l.Size() != int64(n) {
			t.Fatalf("%d bytes: %v, %d chunks", n, err, l.Len())
		}
		again, err := Parse(l.Bytes(), int64(n), l.Root())
		if err != nil || !bytes.Equal(again.Bytes(), l.Bytes()) {
			t.Fatalf("%d bytes: %v", n, err)
		}
		end := int64(0)
		for i := range again.Len() {
			off, length := again.Range(i)
			if off != end {
				t.Errorf("chunk %d begins at %d, want %d", i, off, end)
			}
			end = off + int64(length)
			c := bytes.Clone(b[off:end])
			if err := again.Check(i, c); err != nil {
				t.Error(err)
			}
			c[length/2] ^= 1
			if err := again.Check(i, c); !errors.Is(err, ErrChunk) {
				t.Errorf("took a flipped byte: %v", err)
			}
			if err := again.Check(i, b[off:end-1]); !errors.Is(err, ErrChunk) {
				t.Errorf("took a shorter chunk: %v", err)
			}
		}
		if end != int64(n) {
			t.Errorf("chunks end at %d of %d", end, n)
		}
	}
	if _, _, err := Read(bytes.NewReader(nil)); err == nil {
		t.Error("took an empty file")
	}
}

func TestParseRefuses(t *testing.T) {
	b := content(3 * Size)
	l, _, err := Read(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	raw, root, size := l.Bytes(), l.Root(), l.Size()
	swapped := append(append(bytes.Clone(raw[HashSize:2*HashSize]), raw[:HashSize]...), raw[2*HashSize:]...)
	// Two hashes are as long as one node's content: without the first byte of
	// each kind a node could be passed off as a chunk.
	node := sha256.Sum256(append([]byte{1}, raw[:2*HashSize]...))
	for name, c := range map[string]struct {
		raw  []byte
		size int64
		root digest.Digest
	}{
		"nothing":           {nil, size, root},
		"one hash less":     {raw[:2*HashSize], size, root},
		"one hash more":     {append(bytes.Clone(raw), raw[:HashSize]...), size, root},
		"cut":               {raw[:len(raw)-1], size, root},
		"swapped":           {swapped, size, root},
		"another root":      {raw, size, digest.Of(raw)},
		"nodes for chunks":  {append(node[:], raw[2*HashSize:]...), 2 * Size, root},
		"a chunk more":      {raw, size + 1, root},
		"wrong single hash": {raw[:HashSize], 5, root},
	} {
		_, err := Parse(c.raw, c.size, c.root)
		if name == "nodes for chunks" {
			// The same root by another size: the size stands beside the root, so
			// this list is right, and no chunk can be found for it.
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if !errors.Is(err, ErrList) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
