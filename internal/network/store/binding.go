package store

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/resultity/node/internal/binding"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/wire"
)

// Binding is to which account a node belongs.
type Binding struct {
	Account string      `json:"account"` // "" for none
	Method  wire.Method `json:"method,omitempty"`
	Since   int64       `json:"since,omitempty"` // Unix milliseconds
	// Nonce is that of the request which led here, unbinding included, or the
	// seed of its code: a repetition of that request is known by it.
	Nonce evm.Hash `json:"nonce"`
}

// BindEvent is one change of a node's binding.
type BindEvent struct {
	Time    int64           `json:"time"` // Unix milliseconds
	Action  binding.Action  `json:"action"`
	Account string          `json:"account"`
	Method  wire.Method     `json:"method"` // of the binding that began or ended
	By      string          `json:"by"`     // whose wish it was: owner, node or operator
	Signed  *binding.Signed `json:"signed,omitempty"`
}

// maxHistory bounds the changes that are kept of each node; the oldest go first.
const maxHistory = 32

// Code is a code on its way to an e-mail address. The code itself is made of
// Seed with a key that is not in the store.
type Code struct {
	Seed    evm.Hash `json:"seed"`
	Email   string   `json:"email"`   // "" for one that was not sent, and is not good
	Expires int64    `json:"expires"` // Unix milliseconds
	Tries   int      `json:"tries"`   // wrong ones so far
}

// SetBinding changes whose node it is, and keeps a record of it.
func (n *Node) SetBinding(b Binding, e BindEvent) {
	e.Time, e.Account, e.Method = b.Since, b.Account, b.Method
	e.Action = binding.Bind
	if b.Account == "" {
		e.Action, e.Account, e.Method = binding.Unbind, n.Account, n.Method
	}
	n.Binding = b
	n.Challenge, n.ChallengeExpires, n.Code = evm.Hash{}, 0, nil
	n.History = append(n.History, e)
	n.History = n.History[max(0, len(n.History)-maxHistory):]
}

// UpdateNode changes the record of a registered node as a whole: either all that
// change does is on disk, or nothing. change may be called more than once. An
// error of change is returned as it is, and changes nothing.
func (s *Store) UpdateNode(ctx context.Context, a evm.Address, change func(*Node) error) (Node, error) {
	db, ctx, end, err := s.write(ctx, needed, 0)
	if err != nil {
		return Node{}, fmt.Errorf("change node %s: %w", a, err)
	}
	defer end()
	for {
		e, err := s.entry(ctx, db, db.nodes, nodeKey(a))
		if errors.Is(err, ErrNotFound) {
			return Node{}, fmt.Errorf("node %s: %w", a, err)
		}
		if err != nil {
			return Node{}, fmt.Errorf("read node %s: %w", a, db.failure(err))
		}
		var n Node
		if err := json.Unmarshal(e.Value(), &n); err != nil {
			return Node{}, fmt.Errorf("read node %s: %w", a, err)
		}
		if err := change(&n); err != nil {
			return Node{}, err
		}
		b, err := json.Marshal(n)
		if err != nil {
			return Node{}, err
		}
		failpoint.Here("store.binding.begin")
		_, err = db.nodes.Update(ctx, nodeKey(a), b, e.Revision())
		if errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
			continue // somebody else was first; look again
		}
		if err != nil {
			return Node{}, fmt.Errorf("change node %s: %w", a, db.failure(err))
		}
		failpoint.Here("store.binding.stored")
		return n, nil
	}
}

// TokenAccount takes a use of a token for a node that is registered. Calling it
// again takes no further one. The name of the token goes into [Node.Tokens] when
// the node is bound, so that a token binds a node once: what the operator undoes
// is not undone by whoever finds the token on the node's disk.
func (s *Store) TokenAccount(ctx context.Context, token string, node evm.Address, now time.Time) (account, name string, err error) {
	account, err = s.use(ctx, token, node, now)
	return account, tokenName(token), err
}

func tokenName(token string) string { return hashed(token)[:16] }

// maxTokens bounds the tokens that one node may have used.
const maxTokens = 64

// UseToken notes that a token has bound the node. [ErrToken]: it did already.
func (n *Node) UseToken(name string) error {
	if slices.Contains(n.Tokens, name) || len(n.Tokens) >= maxTokens {
		return ErrToken
	}
	n.Tokens = append(n.Tokens, name)
	return nil
}

// EmailAccount is what stands behind the opaque name of an account. The address
// is for whoever runs the network; it is in no list and no log.
type EmailAccount struct {
	ID      string `json:"id"`
	Email   string `json:"email"`
	Created int64  `json:"created"` // Unix milliseconds
}

// EmailAccount returns the account of an address, making it the first time. The
// case of an address does not count.
func (s *Store) EmailAccount(ctx context.Context, email string, now time.Time) (EmailAccount, error) {
	email = strings.ToLower(email)
	a := EmailAccount{ID: "email-" + strings.ToLower(rand.Text()[:20]), Email: email, Created: now.UnixMilli()}
	b, err := json.Marshal(a)
	if err != nil {
		return EmailAccount{}, err
	}
	db, ctx, end, err := s.write(ctx, needed, len(b))
	if err != nil {
		return EmailAccount{}, fmt.Errorf("make account: %w", err)
	}
	defer end()
	if old, err := get[EmailAccount](ctx, s, db, db.accounts, hashed(email)); !errors.Is(err, ErrNotFound) {
		return old, err
	}
	failpoint.Here("store.account.begin")
	_, err = db.accounts.Create(ctx, hashed(email), b)
	if errors.Is(err, jetstream.ErrKeyExists) {
		return get[EmailAccount](ctx, s, db, db.accounts, hashed(email))
	}
	if err != nil {
		return EmailAccount{}, fmt.Errorf("make account: %w", db.failure(err))
	}
	return a, nil
}

// EmailAccounts returns all of them.
func (s *Store) EmailAccounts(ctx context.Context) (map[string]EmailAccount, error) {
	db := s.now.Load()
	return all[EmailAccount](ctx, s, db, db.accounts)
}

// Mail is a message with a code that has not been handed to a mail server yet.
type Mail struct {
	ID      string      `json:"id"`
	To      string      `json:"to"`
	Node    evm.Address `json:"node"`
	Seed    evm.Hash    `json:"seed"`
	Expires int64       `json:"expires"` // Unix milliseconds; of no use afterwards
}

// PutMail keeps a message until [Store.DeleteMail].
func (s *Store) PutMail(ctx context.Context, m Mail) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	db, ctx, end, err := s.write(ctx, needed, len(b))
	if err != nil {
		return fmt.Errorf("keep mail: %w", err)
	}
	defer end()
	failpoint.Here("store.mail.begin")
	if _, err := db.mails.Create(ctx, m.ID, b); err != nil {
		return fmt.Errorf("keep mail: %w", db.failure(err))
	}
	failpoint.Here("store.mail.stored")
	return nil
}

// Mails returns all messages.
func (s *Store) Mails(ctx context.Context) (map[string]Mail, error) {
	db := s.now.Load()
	return all[Mail](ctx, s, db, db.mails)
}

// DeleteMail forgets a message, all traces of the address included.
func (s *Store) DeleteMail(ctx context.Context, id string) error {
	db, ctx, end, err := s.write(ctx, needed, 0)
	if err != nil {
		return fmt.Errorf("forget mail: %w", err)
	}
	defer end()
	if err := db.mails.Purge(ctx, id); err != nil {
		return fmt.Errorf("forget mail: %w", db.failure(err))
	}
	failpoint.Here("store.mail.forgotten")
	return nil
}
