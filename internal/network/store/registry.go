package store

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/wire"
)

// Node is a registered node.
type Node struct {
	Address    evm.Address `json:"address"`
	Agent      string      `json:"agent"` // version at registration
	Registered int64       `json:"registered"`

	Hello  uint64 `json:"hello,omitempty"`  // the highest count of its hellos that was written down
	Cloned int64  `json:"cloned,omitempty"` // when its key was last seen to be held twice, Unix milliseconds

	Binding
	History []BindEvent `json:"history,omitempty"` // the last ones, oldest first
	Tokens  []string    `json:"tokens,omitempty"`  // names of those that have bound it

	Challenge        evm.Hash `json:"challenge"` // the nonce that is good for the next change
	ChallengeExpires int64    `json:"challenge_expires,omitempty"`
	Code             *Code    `json:"code,omitempty"`
}

// Token is an enrolment token as it is stored: the token itself is known to
// who was given it.
type Token struct {
	Uses    int           `json:"uses"`    // registrations it is good for in all
	Nodes   []evm.Address `json:"nodes"`   // who has used it
	Account string        `json:"account"` // given to the nodes
	Expires int64         `json:"expires"` // Unix milliseconds
}

// MaxTokenUses bounds the registrations of one token: each one is recorded in
// the token.
const MaxTokenUses = 1000

// ErrToken says that an enrolment token is unknown, used up or expired. The
// text does not say which: a guesser learns nothing.
var ErrToken = errors.New("enrolment token is unknown, used up or expired; ask the network's operator for another (resultity-network token create)")

// hashed is the name under which a secret is kept.
func hashed(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// namePattern is what operators may call accounts and API keys: what stands in a
// log, a URL or a command line as it is.
var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:@+-]*$`)

func checkName(what, name string, longest int) error {
	if len(name) > longest || !namePattern.MatchString(name) {
		return fmt.Errorf("%s: %.140q: want 1 to %d letters, digits and ._:@+-, the first one a letter or a digit", what, name, longest)
	}
	return nil
}

// CreateToken makes an enrolment token and returns it; only its hash is kept.
func (s *Store) CreateToken(ctx context.Context, t Token) (string, error) {
	switch {
	case t.Uses < 1 || t.Uses > MaxTokenUses:
		return "", fmt.Errorf("uses is %d, want 1 to %d", t.Uses, MaxTokenUses)
	}
	if err := checkName("account", t.Account, 128); err != nil {
		return "", err
	}
	t.Nodes = []evm.Address{}
	secret := "rt-" + strings.ToLower(rand.Text())
	b, err := json.Marshal(t)
	if err != nil {
		return "", err
	}
	db, ctx, end, err := s.write(ctx, needed, len(b))
	if err != nil {
		return "", fmt.Errorf("store token: %w", err)
	}
	defer end()
	failpoint.Here("store.token.begin")
	if _, err := db.tokens.Create(ctx, hashed(secret), b); err != nil {
		return "", fmt.Errorf("store token: %w", db.failure(err))
	}
	return secret, nil
}

// Node returns a registered node or [ErrNotFound].
func (s *Store) Node(ctx context.Context, a evm.Address) (Node, error) {
	db := s.now.Load()
	return get[Node](ctx, s, db, db.nodes, nodeKey(a))
}

// Nodes returns every registered node, ordered by address.
func (s *Store) Nodes(ctx context.Context) ([]Node, error) {
	db := s.now.Load()
	nodes, err := all[Node](ctx, s, db, db.nodes)
	if err != nil {
		return nil, err
	}
	list := make([]Node, 0, len(nodes))
	for _, n := range nodes {
		list = append(list, n)
	}
	slices.SortFunc(list, func(a, b Node) int { return a.Address.Cmp(b.Address) })
	return list, nil
}

func nodeKey(a evm.Address) string { return hex.EncodeToString(a[:]) }

// Register registers a node with an enrolment token, and binds it to the token's
// account. A node that is registered already is returned as it is, whatever the
// token.
//
// Taking a use and making the node are two writes. The token remembers who
// used it, so that a crash between them costs nothing: the node that comes
// again finds its use still taken for it.
func (s *Store) Register(ctx context.Context, n Node, token string, now time.Time) (Node, error) {
	old, err := s.Node(ctx, n.Address)
	if !errors.Is(err, ErrNotFound) {
		return old, err
	}
	account, name, err := s.TokenAccount(ctx, token, n.Address, now)
	if err != nil {
		return Node{}, err
	}
	n.Tokens = []string{name}
	n.SetBinding(Binding{Account: account, Method: wire.MethodToken, Since: now.UnixMilli()}, BindEvent{By: "owner"})
	return s.create(ctx, n, now)
}

// RegisterUnbound registers a node that belongs to nobody yet.
func (s *Store) RegisterUnbound(ctx context.Context, n Node, now time.Time) (Node, error) {
	return s.create(ctx, n, now)
}

func (s *Store) create(ctx context.Context, n Node, now time.Time) (Node, error) {
	n.Registered = now.UnixMilli()
	b, err := json.Marshal(n)
	if err != nil {
		return Node{}, err
	}
	db, ctx, end, err := s.write(ctx, needed, len(b))
	if err != nil {
		return Node{}, fmt.Errorf("register node: %w", err)
	}
	defer end()
	if old, err := s.Node(ctx, n.Address); !errors.Is(err, ErrNotFound) { // with a damaged one its account would be forgotten
		return old, err
	}
	failpoint.Here("store.node.begin")
	_, err = db.nodes.Create(ctx, nodeKey(n.Address), b)
	if errors.Is(err, jetstream.ErrKeyExists) {
		return s.Node(ctx, n.Address)
	}
	if err != nil {
		return Node{}, fmt.Errorf("register node: %w", db.failure(err))
	}
	failpoint.Here("store.node.stored")
	return n, nil
}

// use takes one use of a token for a node and returns the token's account.
func (s *Store) use(ctx context.Context, token string, node evm.Address, now time.Time) (account string, err error) {
	key := hashed(token)
	db, ctx, end, err := s.write(ctx, needed, 0)
	if err != nil {
		return "", fmt.Errorf("use token: %w", err)
	}
	defer end()
	for {
		e, err := s.entry(ctx, db, db.tokens, key)
		if errors.Is(err, ErrNotFound) || s.lost.of(subjectOf(db.tokens, key)) != nil {
			return "", ErrToken
		}
		if err != nil {
			return "", fmt.Errorf("read token: %w", db.failure(err))
		}
		var t Token
		if err := json.Unmarshal(e.Value(), &t); err != nil {
			return "", fmt.Errorf("read token: %w", err)
		}
		if slices.Contains(t.Nodes, node) {
			return t.Account, nil
		}
		if len(t.Nodes) >= t.Uses || now.UnixMilli() >= t.Expires {
			return "", ErrToken
		}
		t.Nodes = append(t.Nodes, node)
		b, err := json.Marshal(t)
		if err != nil {
			return "", err
		}
		failpoint.Here("store.use.begin")
		_, err = db.tokens.Update(ctx, key, b, e.Revision())
		if errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
			continue // somebody else was first; look again at what is left
		}
		if err != nil {
			return "", fmt.Errorf("use token: %w", db.failure(err))
		}
		failpoint.Here("store.use.stored")
		return t.Account, nil
	}
}

// Client is the holder of an API key.
type Client struct {
	Name    string `json:"name"`
	Created int64  `json:"created"` // Unix milliseconds
}

// clients mirrors the API keys in memory, since every request needs one.
type clients struct {
	mu     sync.RWMutex                 // guards byHash for the length of a look-up
	byHash map[[sha256.Size]byte]Client // filled from the store, and after a write to it
}

func (s *Store) loadClients(ctx context.Context) error {
	db := s.now.Load()
	keys, err := all[Client](ctx, s, db, db.keys)
	if err != nil {
		return err
	}
	m := make(map[[sha256.Size]byte]Client, len(keys))
	for h, c := range keys {
		b, err := hex.DecodeString(h)
		if err != nil || len(b) != sha256.Size {
			return fmt.Errorf("API key under the name %.80q", h)
		}
		m[[sha256.Size]byte(b)] = c
	}
	s.clients.byHash = m
	return nil
}

// CreateAPIKey makes an API key and returns it; only its hash is kept.
func (s *Store) CreateAPIKey(ctx context.Context, name string, now time.Time) (string, error) {
	if err := checkName("name of an API key", name, 64); err != nil {
		return "", err
	}
	c := Client{Name: name, Created: now.UnixMilli()}
	secret := "rk-" + rand.Text()
	b, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	db, ctx, end, err := s.write(ctx, needed, len(b))
	if err != nil {
		return "", fmt.Errorf("store API key: %w", err)
	}
	defer end()
	failpoint.Here("store.key.begin")
	if _, err := db.keys.Create(ctx, hashed(secret), b); err != nil {
		return "", fmt.Errorf("store API key: %w", db.failure(err))
	}
	s.clients.mu.Lock()
	defer s.clients.mu.Unlock()
	s.clients.byHash[sha256.Sum256([]byte(secret))] = c
	return secret, nil
}

// RevokeAPIKeys removes every API key of the name and returns how many. Other keys
// are looked up meanwhile.
func (s *Store) RevokeAPIKeys(ctx context.Context, name string) (n int, err error) {
	db, ctx, end, err := s.write(ctx, needed, 0)
	if err != nil {
		return 0, fmt.Errorf("revoke API key: %w", err)
	}
	defer end()
	var list [][sha256.Size]byte
	s.clients.mu.RLock()
	for h, c := range s.clients.byHash {
		if c.Name == name {
			list = append(list, h)
		}
	}
	s.clients.mu.RUnlock()
	defer s.copy("KV_APIKEYS") // so that damage to one of them does not bring a key back
	for _, h := range list {
		failpoint.Here("store.revocation.begin")
		if err := db.keys.Delete(ctx, hex.EncodeToString(h[:])); err != nil {
			return n, fmt.Errorf("revoke API key: %w", db.failure(err))
		}
		s.clients.mu.Lock()
		if _, ok := s.clients.byHash[h]; ok { // else somebody else was first
			delete(s.clients.byHash, h)
			n++
		}
		s.clients.mu.Unlock()
	}
	return n, nil
}

// Client returns who holds an API key. Keys are looked up by SHA-256: the time
// that takes depends on the hash of a guess, from which nothing leads to a key.
func (s *Store) Client(key string) (Client, bool) {
	sum := sha256.Sum256([]byte(key))
	s.clients.mu.RLock()
	defer s.clients.mu.RUnlock()
	c, ok := s.clients.byHash[sum]
	return c, ok
}

// PutConfig keeps a published configuration, so that results made under it can
// be checked after the next one. It returns when it was first put.
func (s *Store) PutConfig(ctx context.Context, raw []byte) (time.Time, error) {
	key := digest.Of(raw).Hex()
	db := s.now.Load()
	e, err := s.entry(ctx, db, db.published, key)
	if errors.Is(err, ErrNotFound) || s.lost.of(subjectOf(db.published, key)) != nil {
		if err = s.createConfig(ctx, key, raw); err == nil {
			e, err = s.entry(ctx, db, db.published, key)
		}
	}
	if err != nil {
		return time.Time{}, fmt.Errorf("keep configuration: %w", err)
	}
	return e.Created(), nil
}

func (s *Store) createConfig(ctx context.Context, key string, raw []byte) error {
	db, ctx, end, err := s.write(ctx, needed, len(raw))
	if err != nil {
		return err
	}
	defer end()
	failpoint.Here("store.config.begin")
	if _, err := db.published.Create(ctx, key, raw); err != nil && !errors.Is(err, jetstream.ErrKeyExists) {
		return db.failure(err)
	}
	return s.lost.replaced(subjectOf(db.published, key))
}

// Config returns a configuration that was published, or [ErrNotFound].
func (s *Store) Config(ctx context.Context, d digest.Digest) ([]byte, error) {
	db := s.now.Load()
	e, err := s.entry(ctx, db, db.published, d.Hex())
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", d, err)
	}
	return e.Value(), d.Check(e.Value())
}

func get[T any](ctx context.Context, s *Store, db *db, kv jetstream.KeyValue, key string) (v T, err error) {
	e, err := s.entry(ctx, db, kv, key)
	if err != nil {
		return v, fmt.Errorf("%s %s: %w", kv.Bucket(), key, err)
	}
	if err := json.Unmarshal(e.Value(), &v); err != nil {
		return v, fmt.Errorf("%s %s: %w", kv.Bucket(), key, err)
	}
	return v, nil
}

// all reads a bucket once. A record that changes meanwhile is there as it was or as it is.
func all[T any](ctx context.Context, s *Store, db *db, kv jetstream.KeyValue) (map[string]T, error) {
	m, damaged, err := readable[T](ctx, s, db, kv)
	for _, bad := range damaged {
		err = errors.Join(err, bad)
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}

// readable is all, and the records that cannot be read are apart: each is [ErrDamaged].
func readable[T any](ctx context.Context, s *Store, db *db, kv jetstream.KeyValue) (m map[string]T, damaged map[string]error, err error) {
	stream, err := db.js.Stream(ctx, "KV_"+kv.Bucket())
	if err != nil {
		return nil, nil, err
	}
	m, damaged = map[string]T{}, map[string]error{}
	every := subjectOf(kv, ">")
	for seq := uint64(1); ; seq++ {
		r, err := stream.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(every)) // the first from seq on
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return m, damaged, s.end(ctx, db, stream, every, seq)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", kv.Bucket(), err)
		}
		seq = r.Sequence
		key := strings.TrimPrefix(r.Subject, subjectOf(kv, ""))
		delete(m, key)
		delete(damaged, key)
		if r.Header.Get(operation) != "" { // it was deleted
			continue
		}
		var v T
		if err := json.Unmarshal(r.Data, &v); err != nil {
			damaged[key] = fmt.Errorf("%s %s: %w: %w", kv.Bucket(), key, ErrDamaged, err)
			continue
		}
		m[key] = v
	}
}

// operation is the header of a record of a bucket that marks a deletion.
const operation = "KV-Operation"
