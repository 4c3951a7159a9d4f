package store

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/sandbox/record"
)

func TestSandboxes(t *testing.T) {
	s, k := open(t, t.TempDir()), key(t)
	ctx := t.Context()
	made := func(n int) *record.Signed {
		t.Helper()
		return sandboxOf(t, k, n)
	}
	one, two := made(1), made(2)
	for range 2 {
		for _, r := range []*record.Signed{one, two} {
			if err := s.PutSandbox(ctx, r); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got, err := s.Sandbox(ctx, one.Digest()); err != nil || got.Digest() != one.Digest() || got.Record().Time != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := s.Sandbox(ctx, made(3).Digest()); !errors.Is(err, ErrNotFound) {
		t.Errorf("one that was never stored: %v", err)
	}
	if err := s.SetResultTTL(ctx, time.Hour); err != nil {
		t.Fatal(err)
	}
	info, err := s.now.Load().sandboxes.Info(ctx)
	if err != nil || info.Config.MaxAge != time.Hour+sandboxGrace || info.State.Msgs != 2 {
		t.Errorf("%+v, %v", info, err)
	}
	// A node pushes out its own, the oldest first, and nobody else's.
	db := s.now.Load()
	if err := s.bound(ctx, db, "sandboxes."+nodeKey(k.Address())+".*", 1); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Sandbox(ctx, one.Digest()); !errors.Is(err, ErrNotFound) {
		t.Errorf("the older one: %v", err)
	}
	if err := s.bound(ctx, db, "sandboxes."+nodeKey(key(t).Address())+".*", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Sandbox(ctx, two.Digest()); err != nil {
		t.Errorf("the newer one: %v", err)
	}
}

func key(t *testing.T) *evm.Key {
	t.Helper()
	k, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sandboxOf(t testing.TB, k *evm.Key, n int) *record.Signed {
	t.Helper()
	r := &record.Record{
		Version: record.Version, Node: k.Address(), Network: "testnet", Time: int64(n) + 1, Start: fmt.Sprintf("%032x", n), Config: digest.Of([]byte("c")), Image: digest.Of([]byte("i")),
		Views: record.Views{Inside: contract.Sandbox{Version: contract.Version, OK: true, Checks: []contract.Check{{Name: "x", OK: true}}}},
	}
	signed, err := r.Sign(k)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}
