package store

import (
	"errors"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/resultity/node/internal/binding"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/wire"
)

// What is bound, undone and bound again survives a restart, with its history.
func TestBindingHistory(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	now := time.UnixMilli(1_800_000_000_000)
	n, err := s.RegisterUnbound(t.Context(), node(1), now)
	if err != nil || n.Account != "" || len(n.History) != 0 {
		t.Fatalf("%+v %v", n, err)
	}
	for i := range 2 * maxHistory {
		b := Binding{Account: "a", Method: wire.MethodWallet, Since: now.UnixMilli() + int64(i), Nonce: evm.Hash{byte(i)}}
		if i%2 == 1 {
			b.Account, b.Method = "", ""
		}
		n, err = s.UpdateNode(t.Context(), n.Address, func(n *Node) error { n.SetBinding(b, BindEvent{By: "owner"}); return nil })
		if err != nil || n.Binding != b {
			t.Fatalf("%+v %v", n, err)
		}
	}
	if first, last := n.History[0], n.History[maxHistory-1]; len(n.History) != maxHistory || first.Action != binding.Bind ||
		last.Action != binding.Unbind || last.Account != "a" || last.Method != wire.MethodWallet || last.Time != now.UnixMilli()+2*maxHistory-1 {
		t.Errorf("%d events, %+v to %+v", len(n.History), first, last)
	}
	s = reopen(t, s, dir)
	if again, err := s.Node(t.Context(), n.Address); err != nil || !reflect.DeepEqual(again, n) {
		t.Errorf("%+v, want %+v; %v", again, n, err)
	}
	stop := errors.New("stop")
	if _, err := s.UpdateNode(t.Context(), n.Address, func(n *Node) error { n.Account = "x"; return stop }); err != stop {
		t.Errorf("%v", err)
	}
	if again, _ := s.Node(t.Context(), n.Address); again.Account != "" {
		t.Error("a change that failed was kept")
	}
	if _, err := s.UpdateNode(t.Context(), evm.Address{9}, func(*Node) error { return nil }); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown node: %v", err)
	}
}

// Changes at the same time all see one another.
func TestUpdateNodeRace(t *testing.T) {
	s := open(t, t.TempDir())
	if _, err := s.RegisterUnbound(t.Context(), node(1), time.UnixMilli(0)); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := s.UpdateNode(t.Context(), evm.Address{1}, func(n *Node) error { n.Registered++; return nil }); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n, err := s.Node(t.Context(), evm.Address{1}); err != nil || n.Registered != 8 {
		t.Errorf("%+v %v", n, err)
	}
}

// A token binds a node once.
func TestTokenBindsOnce(t *testing.T) {
	s := open(t, t.TempDir())
	now := time.Now()
	token, err := s.CreateToken(t.Context(), Token{Uses: 1, Account: "fleet", Expires: now.Add(time.Hour).UnixMilli()})
	if err != nil {
		t.Fatal(err)
	}
	n, err := s.Register(t.Context(), node(1), token, now)
	if err != nil || n.Method != wire.MethodToken || n.Since != now.UnixMilli() || len(n.History) != 1 {
		t.Fatalf("%+v %v", n, err)
	}
	account, name, err := s.TokenAccount(t.Context(), token, n.Address, now)
	if err != nil || account != "fleet" {
		t.Fatal(account, err)
	}
	if err := n.UseToken(name); !errors.Is(err, ErrToken) {
		t.Errorf("a second time: %v", err)
	}
	for i := range maxTokens + 1 {
		err = n.UseToken(string(rune('A' + i)))
	}
	if !errors.Is(err, ErrToken) {
		t.Error("nothing bounds the tokens of a node")
	}
}

func TestAccountsAndMail(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	now := time.Now()
	a, err := s.EmailAccount(t.Context(), "Ann@Example.org", now)
	if err != nil {
		t.Fatal(err)
	}
	m := Mail{ID: "one", To: "ann@example.org", Node: evm.Address{1}, Seed: evm.Hash{2}, Expires: now.UnixMilli()}
	if err := s.PutMail(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s, dir)
	if b, err := s.EmailAccount(t.Context(), "ann@example.ORG", now.Add(time.Hour)); err != nil || a != b {
		t.Errorf("%+v, want %+v; %v", b, a, err)
	}
	if c, err := s.EmailAccount(t.Context(), "bob@example.org", now); err != nil || a.ID == c.ID {
		t.Errorf("%+v %v", c, err)
	}
	if all, err := s.EmailAccounts(t.Context()); err != nil || len(all) != 2 || all[hashed("ann@example.org")] != a {
		t.Errorf("%+v %v", all, err)
	}
	if ms, err := s.Mails(t.Context()); err != nil || len(ms) != 1 || ms["one"] != m {
		t.Errorf("%+v %v", ms, err)
	}
	if err := s.DeleteMail(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	if ms, err := s.Mails(t.Context()); err != nil || len(ms) != 0 {
		t.Errorf("%+v %v", ms, err)
	}
}
