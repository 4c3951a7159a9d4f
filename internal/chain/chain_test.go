package chain_test

import (
	"encoding/json"
	"errors"
	"os"
	"reflect"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/resultity/node/internal/chain"
	"github.com/resultity/node/internal/snapshot"
)

// Whoever has no key may change the metadata on its way as he likes, and put one
// file in another's place: what is taken says what was signed, value for value. The
// metadata in testdata are of a network made by publish.Init; that they stay the
// same is what makes an input that was found useful.
func FuzzChain(f *testing.F) {
	read := func(name string) []byte {
		raw, err := os.ReadFile("testdata/" + name)
		if err != nil {
			f.Fatal(err)
		}
		return raw
	}
	files := [][]byte{read("1.root.json"), read("timestamp.json"), read("1.snapshot.json"), read("1.targets.json")}
	now := time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC) // soon after they were signed
	// step takes raw as the file at place n, after the genuine ones before it.
	step := func(n int, raw []byte) (err error) {
		if n == 0 {
			_, err := chain.Begin([][]byte{files[0], raw}, now)
			return err
		}
		var trusted *trustedmetadata.TrustedMetadata
		if trusted, err = chain.Begin(files[:1], now); err != nil {
			f.Fatal(err)
		}
		for i := 1; i <= n; i++ {
			b := files[i]
			if i == n {
				b = raw
			}
			switch i {
			case 1:
				err = chain.Timestamp(trusted, b)
			case 2:
				err = chain.Snapshot(trusted, b, false)
			case 3:
				err = chain.Targets(trusted, b)
			}
			if i < n && err != nil {
				f.Fatal(err)
			}
		}
		return err
	}
	for n, b := range files {
		if err := step(n, b); (err == nil) != (n > 0) { // the same root does not follow itself
			f.Fatalf("file %d: %v", n, err)
		}
		for to := range files {
			f.Add(byte(to), b)
		}
	}
	f.Add(byte(1), []byte(`{"signed":null,"signatures":null}`))
	f.Add(byte(3), []byte(`{"signed":{"_type":"targets","delegations":{"keys":{"a":null}}},"signatures":[null]}`))
	f.Fuzz(func(t *testing.T, place byte, raw []byte) {
		n := int(place) % len(files)
		err := step(n, raw)
		if err != nil {
			if err = chain.Refusal("file", err); !errors.Is(err, snapshot.ErrUntrusted) {
				t.Fatal(err)
			}
			return
		}
		var got, want struct{ Signed any }
		if json.Unmarshal(raw, &got) != nil || json.Unmarshal(files[n], &want) != nil || n == 0 || !reflect.DeepEqual(got, want) {
			t.Fatalf("%q is taken for %q", raw, files[n])
		}
	})
}
