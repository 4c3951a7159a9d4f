package agent

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/resultity/node/internal/config"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/state"
	"github.com/resultity/node/internal/tuf"
	"github.com/resultity/node/internal/work"
)

// This file opens a membership: what it has on disk, and its way to the network.

// openStore opens what has been written down of the membership.
func (m *membership) openStore() (err error) {
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return inDir("paths.state", err)
	}
	m.store, err = state.Open(filepath.Join(m.dir, "jobs"), state.DefaultBounds, failpoint.Now)
	switch {
	case errors.Is(err, state.ErrCorrupt), errors.Is(err, state.ErrFormat):
		return &finalError{journal.StoreRefused, err}
	case err != nil && !errors.Is(err, state.ErrLocked): // whoever holds it may go away
		return inDir("paths.state", err)
	case err != nil:
		return err
	}
	m.closers = append(m.closers, m.store.Close)
	m.openSpool(m.dir)
	m.openKept()
	m.tellSalvage()
	return nil
}

// tellSalvage says what of the store was found damaged.
func (m *membership) tellSalvage() {
	found := m.store.Salvage()
	if found == nil {
		return
	}
	dir := filepath.Join(m.dir, "jobs")
	if !found.Loss() {
		m.log.Warn("damage in the job store was put right, and nothing is lost", journal.StoreMended.Attr(), "count", found.Mended, "dir", dir)
		return
	}
	text := fmt.Sprintf("in %s: %d places mended, %d jobs or results lost that can be named, %d receipts lost from the log; kept as found: %s",
		dir, found.Mended, len(found.Lost), found.Leaves, cmp.Or(strings.Join(found.Aside, ", "), "nothing"))
	if !found.Blind.IsZero() {
		text += "; other jobs may be lost, and those made before " + found.Blind.UTC().Format(time.RFC3339) + " are refused"
	}
	if found.Full != nil {
		text += "; there was no room to put it right: free some and restart the agent: " + found.Full.Error()
	}
	m.log.Error("a part of the job store was lost", journal.StoreSalvaged.Attr(), "count", len(found.Lost), "reason", text)
	for _, id := range found.Lost[:min(len(found.Lost), toldLost)] {
		m.log.Error("this node will not answer a job, since the disk has lost it or its result", journal.ResultLost.Attr(), "job", id)
	}
}

// damage is what status shows of it.
func (m *membership) damage() *control.Damage {
	found := m.store.Salvage()
	if found == nil {
		return nil
	}
	d := &control.Damage{Mended: found.Mended, Receipts: found.Leaves}
	for _, id := range found.Lost {
		d.Lost = append(d.Lost, id.String())
	}
	for _, name := range found.Aside {
		d.Kept = append(d.Kept, filepath.Join(m.dir, "jobs", name))
	}
	if !found.Blind.IsZero() {
		at := found.Blind.UTC()
		d.Before = &at
	}
	if found.Full != nil {
		d.Unsolved = found.Full.Error()
	}
	return d
}

// toldLost is how many lost jobs have a record of their own.
const toldLost = 64

// readRoot reads a network's first root.
func readRoot(n *config.Network) ([]byte, error) {
	root, err := durable.ReadFile(n.Root, maxNamed)
	if err != nil {
		return nil, &finalError{journal.ConfigInvalid, fmt.Errorf("network.%s.root: %w; get the network's first root.json from its operator", n.Name, err)}
	}
	return root, nil
}

// open opens the rest: the memory of orders, and the way to the network.
func (m *membership) open() (err error) {
	m.key = m.on.signer()
	if m.http, err = networkClient(&m.net); err != nil {
		return &finalError{journal.ConfigInvalid, err}
	}
	if err := m.sameNode(m.dir); err != nil {
		return err
	}
	if err := m.openRecords(m.dir); err != nil {
		return err
	}
	if err := m.openBook(filepath.Join(m.dir, "orders.json")); err != nil {
		return err
	}
	root, err := readRoot(&m.net)
	if err != nil {
		return err
	}
	if m.snaps, err = tuf.New(tuf.Config{Dir: filepath.Join(m.dir, "tuf"), URL: m.net.URL + "/tuf", Root: root, Client: m.http, Now: failpoint.Now}); err != nil {
		return &finalError{journal.ConfigInvalid, fmt.Errorf("network.%s.root: %w", m.net.Name, err)}
	}
	m.enrol, m.bind = session.Register, session.Bind
	s := session.New(session.Config{
		URL: "wss" + strings.TrimPrefix(m.net.URL, "https"), Network: m.net.Name,
		Node: m.key.Address(), Key: m.key, Agent: m.version, Log: m.log, Now: failpoint.Now,
		TLS: m.http.Transport.(*http.Transport).TLSClientConfig,
		Trusted: func(k evm.Address) bool {
			s := m.board.snapshot()
			return s != nil && trusted(s)(k)
		},
		Config: m.board.config,
		ClockWindow: func() time.Duration {
			s := m.board.snapshot()
			if s == nil {
				return 0 // the session's own default
			}
			return s.Config().Network.ClockWindow.Duration()
		},
	}, m)
	m.session, m.ahead = s, s.Ahead
	m.openWorker(failpoint.Now)
	return nil
}

// openWorker makes the worker, once there are a store, a key and a session.
func (m *membership) openWorker(now func() time.Time) {
	m.worker = work.New(work.Config{
		Store: m.store, Key: m.key, Send: m.deliver, Log: m.log, Now: now,
		Slots: m.slots, Crowded: m.others, Keep: m.keepJob,
		Suspect: func(active *work.Active, why string) { m.on.suspect(m, active, why) },
	})
	m.hold()
}

// sameNode refuses a store of another node, before the network hears of this
// one: its results could be delivered to nobody.
func (m *membership) sameNode(dir string) error {
	reg, err := m.store.Registration()
	if err != nil {
		return err
	}
	if reg != nil && (reg.Node != m.key.Address() || reg.Network != m.net.Name) {
		return &finalError{journal.IdentityRefused, fmt.Errorf("%s belongs to node %s of network %s, and the key is that of node %s; put the old key back, or move that directory away to begin as a new node",
			dir, reg.Node, reg.Network, m.key.Address())}
	}
	return nil
}

// trusted says which keys may sign for the network, by the newest snapshot.
func trusted(s *snapshot.Snapshot) func(evm.Address) bool {
	return func(a evm.Address) bool { return slices.Contains(s.Config().Network.MessageKeys, a) }
}
