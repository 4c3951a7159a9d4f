package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/network/classes"
	"github.com/resultity/node/internal/network/dispatch"
	"github.com/resultity/node/internal/network/orders"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

func adminSocket(dir string) string { return filepath.Join(dir, "admin.sock") }

// listenAdmin makes the admin socket. It gets its final name only once it has
// its final mode. The caller holds the store's lock, so that a socket which is
// there already is a leftover.
func (s *service) listenAdmin() (net.Listener, error) {
	final, first := adminSocket(s.cfg.Dir), filepath.Join(s.cfg.Dir, "store", "admin.sock")
	if len(first) > 100 {
		return nil, fmt.Errorf("%w: dir: %s is too long a path for a unix socket in it (at most 100 bytes)", ErrConfig, s.cfg.Dir)
	}
	// It is there after a start that was cut short.
	if err := os.Remove(first); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: first, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	l.SetUnlinkOnClose(false) // it would remove the wrong name
	failpoint.Here("network.admin.listening")
	if err := errors.Join(os.Chmod(first, 0o600), os.Rename(first, final)); err != nil {
		return nil, fmt.Errorf("admin socket: %w", errors.Join(err, l.Close()))
	}
	return &adminListener{l, final}, nil
}

type adminListener struct {
	*net.UnixListener
	name string
}

// Close may be called again, and then has nothing to do.
func (l *adminListener) Close() error {
	err := l.UnixListener.Close()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return errors.Join(err, os.Remove(l.name))
}

// What the admin socket takes. Whoever can open it owns the service.
type (
	tokenRequest struct {
		Uses    int    `json:"uses"`
		Account string `json:"account"`
		Expires int64  `json:"expires"` // Unix milliseconds
	}
	keyRequest struct {
		Name string `json:"name"`
	}
	resetRequest struct {
		Operator string `json:"operator"`
		Reason   string `json:"reason"`
		Force    bool   `json:"force"`
	}
	adminReply struct {
		Secret string `json:"secret,omitempty"`
		Count  int    `json:"count,omitempty"`
		Error  string `json:"error,omitempty"`

		Node     *NodeInfo      `json:"node,omitempty"`
		Nodes    []NodeInfo     `json:"nodes,omitempty"`
		Accounts []Account      `json:"accounts,omitempty"`
		IDs      []wire.OrderID `json:"ids,omitempty"`
		Orders   []OrderState   `json:"orders,omitempty"`
		Replay   *Replay        `json:"replay,omitempty"`
		Replays  []Replay       `json:"replays,omitempty"`
		Lost     []store.Lost   `json:"lost,omitempty"`
		Reset    *store.Reset   `json:"reset,omitempty"`
	}
)

// answer sends a reply, and what is wrong beside it.
func answer(w http.ResponseWriter, reply adminReply, err error) {
	if err != nil {
		reply.Error = err.Error()
		w.WriteHeader(http.StatusUnprocessableEntity)
	}
	_ = json.NewEncoder(w).Encode(reply) // who has gone needs no answer
}

func (s *service) adminHandler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(r *http.Request) (adminReply, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, maxCommand)
			reply, err := f(r)
			answer(w, reply, err)
		})
	}
	own := storeAdmin{s.store}
	handle("POST /token", func(r *http.Request) (reply adminReply, err error) {
		var q tokenRequest
		if err = decode(r.Body, &q); err == nil {
			reply.Secret, err = own.CreateToken(r.Context(), q.Uses, q.Account, time.UnixMilli(q.Expires))
		}
		return reply, err
	})
	handle("POST /apikey", func(r *http.Request) (reply adminReply, err error) {
		var q keyRequest
		if err = decode(r.Body, &q); err == nil {
			reply.Secret, err = own.CreateAPIKey(r.Context(), q.Name)
		}
		return reply, err
	})
	handle("DELETE /apikey/{name}", func(r *http.Request) (reply adminReply, err error) {
		reply.Count, err = own.RevokeAPIKeys(r.Context(), r.PathValue("name"))
		return reply, err
	})
	handle("GET /nodes", func(r *http.Request) (reply adminReply, err error) {
		reply.Nodes, err = own.Nodes(r.Context())
		s.live(reply.Nodes)
		return reply, err
	})
	handle("GET /nodes/{node}", func(r *http.Request) (reply adminReply, err error) {
		a, err := evm.ParseAddress(r.PathValue("node"))
		if err == nil {
			var n NodeInfo
			n, err = own.Node(r.Context(), a)
			one := []NodeInfo{n}
			s.live(one)
			reply.Node = &one[0]
		}
		return reply, err
	})
	handle("POST /nodes/{node}/unbind", func(r *http.Request) (reply adminReply, err error) {
		a, err := evm.ParseAddress(r.PathValue("node"))
		if err != nil {
			return reply, err
		}
		n, err := own.unbind(r.Context(), a)
		if err == nil {
			s.nodes.Changed(n)
		}
		return reply, err
	})
	handle("POST /nodes/{node}/reset-log", func(r *http.Request) (reply adminReply, err error) {
		var q resetRequest
		a, err := evm.ParseAddress(r.PathValue("node"))
		if err == nil {
			err = decode(r.Body, &q)
		}
		if err == nil {
			_, err = s.store.Node(r.Context(), a)
		}
		if err == nil {
			reply.Reset, err = s.mirror.Reset(r.Context(), a, q.Operator, q.Reason, q.Force)
		}
		return reply, err
	})
	handle("GET /accounts", func(r *http.Request) (reply adminReply, err error) {
		reply.Accounts, err = own.Accounts(r.Context())
		return reply, err
	})
	handle("GET /lost", func(r *http.Request) (reply adminReply, err error) {
		reply.Lost, err = own.Lost(r.Context())
		return reply, err
	})
	handle("DELETE /lost/{id}", func(r *http.Request) (reply adminReply, err error) {
		reply.Count, err = own.ForgetLost(r.Context(), r.PathValue("id"))
		return reply, err
	})
	s.adminOrders(handle)
	s.adminReplays(mux, handle)
	mux.HandleFunc("GET /logs", s.serveLogs)
	handle("POST /reload", func(r *http.Request) (adminReply, error) { return adminReply{}, s.reload(r.Context()) })
	return mux
}

// live writes into nodes what the running service knows of them.
func (s *service) live(nodes []NodeInfo) {
	known := map[evm.Address]dispatch.NodeStatus{}
	for _, n := range s.dispatch.Nodes() {
		known[n.Address] = n
	}
	logs := s.mirror.States()
	for i := range nodes {
		if l, ok := logs[nodes[i].Address]; ok {
			if nodes[i].Log == nil {
				nodes[i].Log = new(NodeLog)
			}
			nodes[i].Log.Waiting, nodes[i].Log.Overdue, nodes[i].Log.LeftOut = l.Waiting, l.Overdue, l.LeftOut
		}
		n := known[nodes[i].Address]
		nodes[i].Connected = n.Connected
		if n.Connected && n.Heartbeat != nil {
			nodes[i].Class = n.Heartbeat.Class
		}
		nodes[i].Answers = s.nodes.Classes().Verdict(nodes[i].Address)
	}
}

// maxCommand bounds what a command sends, in bytes; the longest waits for an order to
// each of a hundred thousand nodes.
const maxCommand = 4 << 20

func decode(r io.Reader, v any) error {
	d := json.NewDecoder(r)
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if large, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return fmt.Errorf("the command has more than %d bytes; give it less at once", large.Limit)
	}
	return err
}

// Reload makes the service of dir take over what is published, if one runs.
func Reload(ctx context.Context, dir string) error {
	c, err := dialAdmin(dir)
	if c == nil || err != nil {
		return err
	}
	defer c.Close()
	_, err = c.call(ctx, http.MethodPost, "/reload", nil)
	return err
}

// dialAdmin reaches the running service of dir; nil when none runs.
func dialAdmin(dir string) (*adminClient, error) {
	conn, err := net.Dial("unix", adminSocket(dir))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	_ = conn.Close() // it was only to see that somebody listens, and nothing was sent
	return &adminClient{http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", adminSocket(dir))
		},
	}, Timeout: 30 * time.Second}}, nil
}

// Admin changes what is in the store of a network.
type Admin interface {
	// CreateToken makes an enrolment token that is good for uses nodes.
	CreateToken(ctx context.Context, uses int, account string, expires time.Time) (string, error)
	// CreateAPIKey makes an API key.
	CreateAPIKey(ctx context.Context, name string) (string, error)
	// RevokeAPIKeys removes all API keys of a name and returns how many.
	RevokeAPIKeys(ctx context.Context, name string) (int, error)
	// Nodes returns the registered nodes, ordered by address; without histories.
	Nodes(context.Context) ([]NodeInfo, error)
	// Node returns one of them.
	Node(context.Context, evm.Address) (NodeInfo, error)
	// Unbind takes a node from its account.
	Unbind(context.Context, evm.Address) error
	// ResetLog has the receipt log of a node begin anew. operator says who does it, and
	// reason why, to everybody. Without force the log must contradict itself, or lack
	// something.
	ResetLog(ctx context.Context, node evm.Address, operator, reason string, force bool) (*store.Reset, error)
	// Accounts returns the accounts that have nodes, or had, ordered by name.
	Accounts(context.Context) ([]Account, error)
	// IssueOrders gives an order to a node, or to every registered one for nil,
	// and returns the ids; those that were issued also beside an error.
	IssueOrders(ctx context.Context, node *evm.Address, w orders.What) ([]wire.OrderID, error)
	// WaitOrders returns once each order has been answered or has expired.
	WaitOrders(ctx context.Context, ids []wire.OrderID) error
	// Orders returns all orders that are kept, in the order of their issue.
	Orders(ctx context.Context) ([]OrderState, error)
	// Replay gives a finished job to a second node and compares the answers. There may
	// be a replay beside an error: then it could not be written down.
	Replay(ctx context.Context, id receipt.JobID, q ReplayQuery) (*Replay, error)
	// Replays returns what came of replays, in the order of their ends.
	Replays(context.Context) ([]Replay, error)
	// Lost returns the records that damage to the store has cost.
	Lost(context.Context) ([]store.Lost, error)
	// ForgetLost has a lost record be one that never was, and returns how many.
	ForgetLost(ctx context.Context, id string) (int, error)
	// Logs passes the records of nodes' logs that are chosen to f.
	Logs(ctx context.Context, q LogQuery, f func(LogLine) error) error
	Close()
}

// NodeInfo is what the registry knows of a node.
type NodeInfo struct {
	Address    evm.Address       `json:"address"`
	Agent      string            `json:"agent"`      // version at registration
	Registered int64             `json:"registered"` // Unix milliseconds
	Account    string            `json:"account"`    // "" for none
	Method     wire.Method       `json:"method,omitempty"`
	Since      int64             `json:"since,omitempty"`  // Unix milliseconds
	Cloned     int64             `json:"cloned,omitempty"` // Unix milliseconds: when its key was last seen to be held twice
	History    []store.BindEvent `json:"history,omitempty"`
	Connected  bool              `json:"connected"`         // as the running service has it
	Class      *wire.Class       `json:"class,omitempty"`   // of the node's runtime, as it says
	Answers    classes.Verdict   `json:"answers,omitempty"` // golden ones, beside those of its class
	Log        *NodeLog          `json:"log,omitempty"`     // of its receipts
}

// NodeLog is what is known of the receipt log of a node.
type NodeLog struct {
	store.LogSummary
	Damaged string `json:"damaged,omitempty"` // why what is stored of it cannot be read
	Waiting int    `json:"waiting"`           // receipts that the service has and that are not known to be in the log
	Overdue int    `json:"overdue"`           // of these, those that should be
}

// Account is an owner of nodes.
type Account struct {
	ID    string        `json:"id"`
	Email string        `json:"email,omitempty"` // for the operator's eyes
	Nodes []evm.Address `json:"nodes"`
}

// A service that starts has its store before its socket. Tests have less patience.
var adminWait = 30 * time.Second

const adminRetry = 50 * time.Millisecond

// OpenAdmin reaches the running service of dir, or opens its store when none
// runs. It waits for one that starts, or for another command.
func OpenAdmin(ctx context.Context, dir string, log *slog.Logger) (Admin, error) {
	if _, err := os.Stat(filepath.Join(dir, "publish.json")); err != nil {
		return nil, fmt.Errorf("%w: dir: %s holds no network: %w", ErrConfig, dir, err)
	}
	for begun := time.Now(); ; {
		if c, err := dialAdmin(dir); c != nil || err != nil {
			return c, err
		}
		s, err := store.Open(ctx, filepath.Join(dir, "store"), log)
		if err == nil {
			return storeAdmin{s}, nil
		}
		if !errors.Is(err, store.ErrLocked) || time.Since(begun) >= adminWait {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(adminRetry):
		}
	}
}

// storeAdmin works on the store itself.
type storeAdmin struct{ store *store.Store }

func (a storeAdmin) CreateToken(ctx context.Context, uses int, account string, expires time.Time) (string, error) {
	if !expires.After(time.Now()) {
		return "", fmt.Errorf("the token would expire at %s, in the past", expires.UTC().Format(time.RFC3339))
	}
	return a.store.CreateToken(ctx, store.Token{Uses: uses, Account: account, Expires: expires.UnixMilli()})
}

func (a storeAdmin) CreateAPIKey(ctx context.Context, name string) (string, error) {
	return a.store.CreateAPIKey(ctx, name, time.Now())
}

func (a storeAdmin) RevokeAPIKeys(ctx context.Context, name string) (int, error) {
	return a.store.RevokeAPIKeys(ctx, name)
}

func (a storeAdmin) Nodes(ctx context.Context) ([]NodeInfo, error) {
	nodes, err := a.store.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	logs, damaged, err := a.store.ReceiptLogs(ctx)
	list := make([]NodeInfo, 0, len(nodes))
	for _, n := range nodes {
		n.History = nil
		v := info(n)
		if l, ok := logs[n.Address]; ok {
			v.Log = &NodeLog{LogSummary: l}
		} else if err := damaged[n.Address]; err != nil {
			v.Log = &NodeLog{Damaged: err.Error()}
		}
		list = append(list, v)
	}
	return list, err
}

func (a storeAdmin) Node(ctx context.Context, addr evm.Address) (NodeInfo, error) {
	n, err := a.store.Node(ctx, addr)
	v := info(n)
	if err != nil {
		return v, err
	}
	switch l, err := a.store.ReceiptLog(ctx, addr); {
	case err == nil:
		v.Log = &NodeLog{LogSummary: l.LogSummary}
	case errors.Is(err, store.ErrDamaged):
		v.Log = &NodeLog{Damaged: err.Error()}
	case !errors.Is(err, store.ErrNotFound):
		return v, err
	}
	return v, nil
}

// info leaves out what is nobody's business: codes, and where they went.
func info(n store.Node) NodeInfo {
	return NodeInfo{Address: n.Address, Agent: n.Agent, Registered: n.Registered, Account: n.Account, Method: n.Method, Since: n.Since, Cloned: n.Cloned, History: n.History}
}

func (a storeAdmin) Lost(context.Context) ([]store.Lost, error) { return a.store.Lost(), nil }

func (a storeAdmin) ForgetLost(_ context.Context, id string) (int, error) {
	return a.store.ForgetLost(id)
}

func (a storeAdmin) Unbind(ctx context.Context, addr evm.Address) error {
	_, err := a.unbind(ctx, addr)
	return err
}

func (a storeAdmin) unbind(ctx context.Context, addr evm.Address) (store.Node, error) {
	return a.store.UpdateNode(ctx, addr, func(n *store.Node) error {
		if n.Account == "" {
			return fmt.Errorf("node %s is bound to no account", addr)
		}
		n.SetBinding(store.Binding{Since: time.Now().UnixMilli()}, store.BindEvent{By: "operator"})
		return nil
	})
}

func (a storeAdmin) ResetLog(context.Context, evm.Address, string, string, bool) (*store.Reset, error) {
	return nil, fmt.Errorf("%w: a receipt log is reset by the running service; start it (resultity-network serve)", ErrConfig)
}

func (a storeAdmin) Accounts(ctx context.Context) ([]Account, error) {
	nodes, err := a.store.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	emails, err := a.store.EmailAccounts(ctx)
	if err != nil {
		return nil, err
	}
	of := map[string][]evm.Address{}
	for _, n := range nodes {
		if n.Account != "" {
			of[n.Account] = append(of[n.Account], n.Address)
		}
	}
	byID := map[string]string{}
	for _, e := range emails {
		byID[e.ID] = e.Email
		if of[e.ID] == nil {
			of[e.ID] = []evm.Address{}
		}
	}
	list := make([]Account, 0, len(of))
	for id, nodes := range of {
		list = append(list, Account{ID: id, Email: byID[id], Nodes: nodes})
	}
	slices.SortFunc(list, func(a, b Account) int { return strings.Compare(a.ID, b.ID) })
	return list, nil
}

func (a storeAdmin) Close() { a.store.Close() }

// maxAdminReply bounds what the service may answer, in bytes. Tests have less memory.
var maxAdminReply int64 = 256 << 20

// adminClient asks the running service.
type adminClient struct{ http http.Client }

// turnedAway says what is behind a connection that the service has closed at once.
func turnedAway(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return fmt.Errorf("admin socket: the service has ended the connection: it has stopped, or %d other commands are there (some may wait, as order --wait does); try again, or end one of them: %w", maxCommands, err)
	}
	return err
}

func (c *adminClient) call(ctx context.Context, method, path string, body any) (adminReply, error) {
	var reply adminReply
	b, err := json.Marshal(body)
	if err != nil {
		return reply, err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://admin"+path, bytes.NewReader(b))
	if err != nil {
		return reply, err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return reply, turnedAway(err)
	}
	defer res.Body.Close() // what was read counts
	err = json.NewDecoder(http.MaxBytesReader(nil, res.Body, maxAdminReply)).Decode(&reply)
	if large, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return reply, fmt.Errorf("admin socket: the answer has more than %d bytes; ask for less at once, such as for one node", large.Limit)
	}
	if err != nil {
		return reply, fmt.Errorf("admin socket: %s: %w", res.Status, err)
	}
	if reply.Error != "" { // beside what was done
		return reply, errors.New(strings.TrimSpace(reply.Error))
	}
	return reply, nil
}

func (c *adminClient) CreateToken(ctx context.Context, uses int, account string, expires time.Time) (string, error) {
	r, err := c.call(ctx, http.MethodPost, "/token", tokenRequest{Uses: uses, Account: account, Expires: expires.UnixMilli()})
	return r.Secret, err
}

func (c *adminClient) CreateAPIKey(ctx context.Context, name string) (string, error) {
	r, err := c.call(ctx, http.MethodPost, "/apikey", keyRequest{Name: name})
	return r.Secret, err
}

func (c *adminClient) RevokeAPIKeys(ctx context.Context, name string) (int, error) {
	r, err := c.call(ctx, http.MethodDelete, "/apikey/"+url.PathEscape(name), nil)
	return r.Count, err
}

func (c *adminClient) Lost(ctx context.Context) ([]store.Lost, error) {
	r, err := c.call(ctx, http.MethodGet, "/lost", nil)
	return r.Lost, err
}

func (c *adminClient) ForgetLost(ctx context.Context, id string) (int, error) {
	r, err := c.call(ctx, http.MethodDelete, "/lost/"+url.PathEscape(id), nil)
	return r.Count, err
}

func (c *adminClient) Nodes(ctx context.Context) ([]NodeInfo, error) {
	r, err := c.call(ctx, http.MethodGet, "/nodes", nil)
	return r.Nodes, err
}

func (c *adminClient) Node(ctx context.Context, a evm.Address) (NodeInfo, error) {
	r, err := c.call(ctx, http.MethodGet, "/nodes/"+a.Hex(), nil)
	if err != nil || r.Node == nil {
		return NodeInfo{}, err
	}
	return *r.Node, nil
}

func (c *adminClient) Unbind(ctx context.Context, a evm.Address) error {
	_, err := c.call(ctx, http.MethodPost, "/nodes/"+a.Hex()+"/unbind", nil)
	return err
}

func (c *adminClient) ResetLog(ctx context.Context, a evm.Address, operator, reason string, force bool) (*store.Reset, error) {
	r, err := c.call(ctx, http.MethodPost, "/nodes/"+a.Hex()+"/reset-log", resetRequest{operator, reason, force})
	return r.Reset, err
}

func (c *adminClient) Accounts(ctx context.Context) ([]Account, error) {
	r, err := c.call(ctx, http.MethodGet, "/accounts", nil)
	return r.Accounts, err
}

func (c *adminClient) Close() { c.http.CloseIdleConnections() }
