package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/tuf"
	"github.com/resultity/node/internal/wire"
)

// follow asks the network for its newest configuration, at least every
// refreshEvery, and registers the node. It is a loop of its own, so that a
// network that does not answer holds up nothing.
func (a *Agent) follow(ctx context.Context) error {
	var next backoff
	for {
		if err := a.askNetwork(ctx); err != nil {
			next.failed()
			a.sayExpired(time.Now())
		} else {
			next = backoff{at: time.Now().Add(jittered(refreshEvery))}
		}
		poke(a.look)
		poke(a.beat)
		timer := time.NewTimer(time.Until(next.at))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-a.update:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// recall takes up the configuration that was verified last, so that a node goes
// on without its network.
func (a *Agent) recall() {
	s, err := a.snaps.Last()
	if err == nil {
		err = a.ours(s)
	}
	switch {
	case err == nil:
		a.learn(s)
	case !errors.Is(err, fs.ErrNotExist):
		a.log.Error("the kept configuration cannot be used; a new one is fetched", journal.SnapshotRefused.Attr(), "error", err)
	}
}

// ours refuses the configuration of another network. Its signatures may be
// right: who changed the URL, or has one root for two networks, finds out here.
func (a *Agent) ours(s *snapshot.Snapshot) error {
	if got, want := s.Config().Network.Name, a.cfg.Network.Name; got != want {
		return fmt.Errorf("%w: it is for %s, and agent.toml has network.name = %q", errOtherNetwork, got, want)
	}
	return nil
}

var errOtherNetwork = errors.New("the configuration is another network's")

// askNetwork does what needs the network's answer.
func (a *Agent) askNetwork(ctx context.Context) error {
	err := a.refresh(ctx)
	if snap := a.board.snapshot(); snap != nil && !a.isRegistered() {
		err = errors.Join(err, a.register(ctx, snap))
	}
	return err
}

func (a *Agent) refresh(ctx context.Context) error {
	s, err := a.snaps.Refresh(ctx)
	if err == nil {
		err = a.ours(s)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		var before error
		a.board.set(func(b *board) { before, b.snapErr = b.snapErr, err })
		if !sameError(before, err) { // say it once, not at every try
			a.log.Warn("configuration not refreshed", tuf.Event(err).Attr(), "error", err)
		}
		return err
	}
	a.learn(s)
	a.board.set(func(b *board) { b.snapErr, b.refreshed = nil, time.Now() })
	return nil
}

// sayExpired says once for a configuration that it has expired while the network
// was away. The node goes on with it: what it was told last is still what it was
// told, and whoever holds newer words back gains nothing by its going down.
func (a *Agent) sayExpired(now time.Time) {
	s := a.board.snapshot()
	if s == nil || now.Before(s.Expires()) {
		return
	}
	var said bool
	a.board.set(func(b *board) { said, b.expired = b.expired == s.Digest(), s.Digest() })
	if !said {
		a.log.Warn("the configuration has expired; the node goes on with it", journal.SnapshotExpired.Attr(), "version", s.Version(), "since", s.Expires().UTC().Format(time.RFC3339))
	}
}

func sameError(a, b error) bool { return a != nil && b != nil && a.Error() == b.Error() }

// learn makes s what should be.
func (a *Agent) learn(s *snapshot.Snapshot) {
	before := a.board.snapshot()
	if before == nil || before.Digest() != s.Digest() {
		a.log.Info("configuration verified", journal.SnapshotVerified.Attr(), "version", s.Version(), "digest", s.Digest())
		poke(a.upload)
	}
	a.board.learn(s)
}

func (a *Agent) isRegistered() bool {
	select {
	case <-a.registered:
		return true
	default:
		return false
	}
}

// register makes the node known, once in its life.
func (a *Agent) register(ctx context.Context, snap *snapshot.Snapshot) error {
	reg, err := a.store.Registration()
	if err == nil && reg == nil {
		reg, err = a.registerNow(ctx, snap)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		var before error
		a.board.set(func(b *board) { before, b.regErr = b.regErr, err })
		if !sameError(before, err) {
			a.log.Warn("not registered", journal.RegisterRefused.Attr(), "error", err)
		}
		return err
	}
	a.board.set(func(b *board) {
		b.registered, b.regErr = true, nil
		b.bound = wire.Bound{Account: reg.Account, Method: reg.Method, Since: reg.Since}
	})
	close(a.registered)
	return nil
}

// registerTimeout bounds the talk of a registration.
const registerTimeout = time.Minute

func (a *Agent) registerNow(ctx context.Context, snap *snapshot.Snapshot) (*wire.Registered, error) {
	token, err := readToken(a.cfg.Network.EnrolmentToken)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	reg, err := a.enrol(ctx, session.Registration{
		URL: a.cfg.Network.URL, Client: a.http, Key: a.key, Trusted: trusted(snap),
		Body: wire.Registration{Network: a.cfg.Network.Name, Node: a.key.Address(), Token: token, Agent: a.version},
	})
	if err != nil {
		return nil, err
	}
	if err := a.store.SetRegistration(reg); err != nil {
		return nil, fmt.Errorf("keep the registration: %w", err)
	}
	a.log.Info("registered", journal.Registered.Attr(), "network", reg.Network, "account", reg.Account, "node", a.key.Address())
	return reg, nil
}

// errToken says that there is a file for the token and no token in it.
var errToken = errors.New("network.enrolment_token")

const maxToken = 4 << 10 // bytes

// readToken reads the file with the enrolment token; "" for none.
func readToken(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	f, err := os.Open(name)
	if err != nil {
		return "", fmt.Errorf("%w: %w", errToken, err)
	}
	defer f.Close() // read only: nothing to lose
	raw, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	token := strings.TrimSpace(string(raw))
	switch {
	case err != nil:
		return "", fmt.Errorf("%w: %w", errToken, err)
	case token == "" || len(raw) > maxToken:
		return "", fmt.Errorf("%w: %s holds no token", errToken, name)
	}
	return token, nil
}
