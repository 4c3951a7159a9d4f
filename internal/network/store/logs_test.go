package store

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// A node that sends without end pushes out its own logs only.
func TestLogsOfANodeAreBounded(t *testing.T) {
	s := open(t, t.TempDir())
	put := func(key *evm.Key, n uint64) {
		t.Helper()
		p := wire.NewPacker(wire.MaxLogBatch)
		p.Add(fmt.Appendf(nil, `{"n":%d,"time":1,"level":"INFO","message":"job done"}`, n))
		l, err := wire.SealLogs(key, wire.LogBatch{Network: "testnet", Node: key.Address(), Spool: strings.Repeat("ab", 16), After: n - 1, Last: n, Count: 1}, p.Data())
		if err != nil {
			t.Fatal(err)
		}
		b, _, err := l.Open()
		if err != nil {
			t.Fatal(err)
		}
		if at, err := s.PutLogs(t.Context(), b, l); at != n || err != nil {
			t.Fatalf("stored up to %d, %v", at, err)
		}
	}
	read := func(key *evm.Key) (firsts []uint64) {
		t.Helper()
		who := key.Address()
		err := s.ReadLogs(t.Context(), &who, time.Time{}, func(_ *Logs, b *wire.LogBatch) error {
			firsts = append(firsts, b.Last)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return firsts
	}
	var keys [2]*evm.Key
	for i := range keys {
		var err error
		if keys[i], err = evm.NewKey(); err != nil {
			t.Fatal(err)
		}
	}
	quiet, loud := keys[0], keys[1]
	put(quiet, 1)
	for n := range uint64(logBatches + 6) {
		put(loud, n+1)
	}
	t.Logf("a loud node beside a quiet one: expected: %d and 1 batches; got: %d and %d", logBatches, len(read(loud)), len(read(quiet)))
	if got := read(loud); len(got) != logBatches || got[0] != 7 {
		t.Errorf("%d batches of the loud node: %v", len(got), got)
	}
	if got := read(quiet); len(got) != 1 {
		t.Errorf("%d batches of the quiet node", len(got))
	}
}

// What is read as a stored result is written again as the same.
func FuzzDecodeResult(f *testing.F) {
	f.Add([]byte{0, 0, 0, 2, '{', '}'})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0, 0})
	b, err := encodeResult(signed(f, receipt.NewJobID()), receipt.Unknown, []byte("fine"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeResult(b)
		if err != nil {
			return
		}
		out, err := encodeResult(r.Receipt, r.Said, r.Response)
		if err != nil {
			t.Fatal(err)
		}
		again, err := decodeResult(out)
		if err != nil || !bytes.Equal(again.Response, r.Response) || again.Receipt.Receipt() != r.Receipt.Receipt() || again.Receipt.Signature() != r.Receipt.Signature() || again.Said != r.Said {
			t.Fatalf("%q came back as %q, %v", b, out, err)
		}
	})
}
