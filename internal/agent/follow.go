package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/tuf"
	"github.com/resultity/node/internal/wire"
)

// follow asks the network for its newest configuration, at least every
// refreshEvery, and registers the node. It is a loop of its own, so that a
// network that does not answer holds up nothing.
func (m *membership) follow(ctx context.Context) error {
	var next backoff
	for {
		earliest := time.Now().Add(updateGap)
		if err := m.askNetwork(ctx); err != nil {
			next.failed()
			m.sayExpired(time.Now())
		} else {
			next = backoff{at: time.Now().Add(jittered(refreshEvery))}
		}
		m.board.set(func(b *board) { b.asked = true })
		m.on.changed()
		poke(m.beat)
		timer := time.NewTimer(time.Until(next.at))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-m.update:
			timer.Reset(time.Until(earliest))
			select {
			case <-ctx.Done():
				timer.Stop()
				return nil
			case <-timer.C:
			}
		case <-timer.C:
		}
		timer.Stop()
	}
}

// updateGap is the least time between two questions for the configuration: a network
// that says without end that there is news has the node check the same again.
const updateGap = time.Second / 4

// recall takes up the configuration that was verified last, so that a node goes
// on without its network.
func (m *membership) recall() {
	s, err := m.snaps.Last()
	if err == nil {
		err = m.ours(s)
	}
	switch {
	case err == nil:
		m.learn(s)
	case !errors.Is(err, fs.ErrNotExist):
		m.log.Error("the kept configuration cannot be used; a new one is fetched", journal.SnapshotRefused.Attr(), "error", err)
	}
}

// ours refuses the configuration of another network. Its signatures may be
// right: who changed the URL, or has one root for two networks, finds out here.
func (m *membership) ours(s *snapshot.Snapshot) error {
	if got, want := s.Config().Network.Name, m.net.Name; got != want {
		return fmt.Errorf("%w: it is for %s, and agent.toml has its address in [network.%s]", errOtherNetwork, got, want)
	}
	return nil
}

var errOtherNetwork = errors.New("the configuration is another network's")

// askNetwork does what needs the network's answer.
func (m *membership) askNetwork(ctx context.Context) error {
	err := m.refresh(ctx)
	if snap := m.board.snapshot(); snap != nil && !m.isRegistered() {
		err = errors.Join(err, m.register(ctx, snap))
	}
	return err
}

func (m *membership) refresh(ctx context.Context) error {
	s, err := m.snaps.Refresh(ctx)
	if err == nil {
		err = m.ours(s)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		var before error
		m.board.set(func(b *board) { before, b.snapErr = b.snapErr, err })
		if !sameError(before, err) { // say it once, not at every try
			m.log.Warn("configuration not refreshed", tuf.Event(err).Attr(), "error", err)
		}
		return err
	}
	m.learn(s)
	m.board.set(func(b *board) { b.snapErr, b.refreshed = nil, time.Now() })
	return nil
}

// sayExpired says once for a configuration that it has expired while the network
// was away. The node goes on with it: what it was told last is still what it was
// told, and whoever holds newer words back gains nothing by its going down.
func (m *membership) sayExpired(now time.Time) {
	s := m.board.snapshot()
	if s == nil || now.Before(s.Expires()) {
		return
	}
	var said bool
	m.board.set(func(b *board) { said, b.expired = b.expired == s.Digest(), s.Digest() })
	if !said {
		m.log.Warn("the configuration has expired; the node goes on with it", journal.SnapshotExpired.Attr(), "version", s.Version(), "since", s.Expires().UTC().Format(time.RFC3339))
	}
}

func sameError(a, b error) bool { return a != nil && b != nil && a.Error() == b.Error() }

// learn makes s what should be.
func (m *membership) learn(s *snapshot.Snapshot) {
	before := m.board.snapshot()
	if before == nil || before.Digest() != s.Digest() {
		m.log.Info("configuration verified", journal.SnapshotVerified.Attr(), "version", s.Version(), "digest", s.Digest())
		poke(m.upload)
	}
	m.board.learn(s)
}

func (m *membership) isRegistered() bool {
	select {
	case <-m.registered:
		return true
	default:
		return false
	}
}

// register makes the node known, once in its life.
func (m *membership) register(ctx context.Context, snap *snapshot.Snapshot) error {
	reg, err := m.store.Registration()
	if err == nil && reg == nil {
		reg, err = m.registerNow(ctx, snap)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		var before error
		m.board.set(func(b *board) { before, b.regErr = b.regErr, err })
		if !sameError(before, err) {
			m.log.Warn("not registered", registrationEvent(err).Attr(), "error", err)
		}
		return err
	}
	m.board.set(func(b *board) {
		b.registered, b.regErr = true, nil
		b.bound = wire.Bound{Account: reg.Account, Method: reg.Method, Since: reg.Since}
	})
	close(m.registered)
	return nil
}

// registrationEvent says in the catalog's terms why the node is not registered.
func registrationEvent(err error) *journal.Event {
	status, answered := errors.AsType[*session.StatusError](err)
	switch {
	case errors.Is(err, wire.ErrClock):
		return journal.ClockWrong
	case answered && status.Status < http.StatusInternalServerError,
		slices.ContainsFunc(registrationCauses, func(c cause) bool { return errors.Is(err, c.is) }):
		return journal.RegisterRefused
	}
	return journal.RegisterFailed
}

// registerTimeout bounds the talk of a registration.
const registerTimeout = time.Minute

func (m *membership) registerNow(ctx context.Context, snap *snapshot.Snapshot) (*wire.Registered, error) {
	token, err := readToken(m.net.EnrolmentToken)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	reg, err := m.enrol(ctx, session.Registration{
		URL: m.net.URL, Client: m.http, Key: m.key, Trusted: trusted(snap),
		Body: wire.Registration{Network: m.net.Name, Node: m.key.Address(), Token: token, Agent: m.version},
	})
	if err != nil {
		return nil, err
	}
	if err := m.store.SetRegistration(reg); err != nil {
		return nil, fmt.Errorf("keep the registration: %w", err)
	}
	m.log.Info("registered", journal.Registered.Attr(), "network", reg.Network, "account", reg.Account, "node", m.key.Address())
	return reg, nil
}

// errToken says that there is a file for the token and no token in it.
var errToken = errors.New("network.NAME.enrolment_token")

const maxToken = 4 << 10 // bytes

// readToken reads the file with the enrolment token; "" for none.
func readToken(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	raw, err := durable.ReadFile(name, maxToken)
	token := strings.TrimSpace(string(raw))
	switch {
	case err != nil && !errors.Is(err, durable.ErrLarge):
		return "", fmt.Errorf("%w: %w", errToken, err)
	case err != nil || token == "":
		return "", fmt.Errorf("%w: %s holds no token", errToken, name)
	}
	return token, nil
}
