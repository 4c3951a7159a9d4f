// Package tuf owns the node's side of the network's TUF repository: fetching
// metadata and configuration, and keeping the last verified set on disk.
//
// The rule it keeps: a [snapshot.Snapshot] leaves this package only after the
// whole chain, from the root that was shipped with the node to the bytes of
// config.json, has been verified in this call, whether the bytes came over the
// network or from disk. The disk is trusted no more than the network: what it
// adds is the memory of versions already seen, and of the last good set.
//
// [Client.Refresh] follows the client workflow of the TUF specification
// (section 5), with consistent snapshots; package chain verifies each file. It
// does not use go-tuf's updater: that one takes no context, fetches every
// root again each time, and replaces its cached files one by one and unsynced,
// so that a crash can leave a set that was never verified as a whole.
//
// # Layout
//
// Below the base URL lie metadata/N.root.json, metadata/timestamp.json,
// metadata/N.snapshot.json, metadata/N.targets.json and
// targets/SHA256.config.json.
//
// # What an attacker can do
//
// Whoever controls the network path or the web server can keep a node from
// learning news, and is found out when the timestamp expires; nothing else.
// Whoever can write the cache can delete it, or put back an older set with the
// time at which it was valid; the network is asked for news all the same.
package tuf

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/resultity/node/internal/chain"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/snapshot"
)

// How a refresh can fail. [ErrUnreachable] is about reach: nothing is known to
// be wrong, try again later. The others come together with
// [snapshot.ErrUntrusted]: what arrived is not what the network vouches for
// now. Neither touches what [Client.Last] returns. [Event] tells them apart for
// the journal.
var (
	ErrUnreachable = errors.New("network cannot be reached")
	ErrRedirect    = errors.New("refused to follow a redirect")

	ErrUnsigned  = chain.ErrUnsigned
	ErrExpired   = chain.ErrExpired
	ErrRollback  = chain.ErrRollback
	ErrMixed     = chain.ErrMixed
	ErrRoot      = chain.ErrRoot
	ErrMalformed = chain.ErrMalformed
	ErrTooLarge  = chain.ErrTooLarge
)

// events are what the journal says of each of them.
var events = []struct {
	is    error
	event *journal.Event
}{
	{ErrUnreachable, journal.SnapshotStale},
	{ErrRedirect, journal.SnapshotRedirected},
	{ErrUnsigned, journal.SnapshotUnsigned},
	{ErrExpired, journal.SnapshotFrozen},
	{ErrRollback, journal.SnapshotRollback},
	{ErrMixed, journal.SnapshotMixed},
	{ErrRoot, journal.SnapshotRoot},
	{ErrMalformed, journal.SnapshotMalformed},
	{ErrTooLarge, journal.SnapshotTooLarge},
	{snapshot.ErrFiles, journal.SnapshotFiles},
	{snapshot.ErrInvalid, journal.SnapshotUnusable},
}

// Event returns the event that tells of err, which is an error of [Client].
func Event(err error) *journal.Event {
	for _, e := range events {
		if errors.Is(err, e.is) {
			return e.event
		}
	}
	return journal.SnapshotRefused
}

// maxRoots bounds the versions of root after the shipped one.
const maxRoots = 256

// Config says what to follow and where to remember it.
type Config struct {
	Dir    string           // of the cache; made with mode 0700 when missing. One process at a time.
	URL    string           // base of metadata/ and targets/, https
	Root   []byte           // the root.json shipped with the node: all trust begins here
	Client *http.Client     // nil means a client of net/http's defaults
	Now    func() time.Time // nil means time.Now
}

// Client follows one repository. It is safe for concurrent use; refreshes go
// one after another.
type Client struct {
	root []byte
	base *url.URL
	http *http.Client
	now  func() time.Time
	dir  string
	file string        // the cache: see state
	busy chan struct{} // holds one token while a refresh runs
}

// New checks cfg and prepares the cache. It does not use the network.
func New(cfg Config) (*Client, error) {
	if _, err := chain.Begin([][]byte{cfg.Root}, time.Time{}); err != nil {
		return nil, fmt.Errorf("shipped root: %w", err)
	}
	base, err := url.Parse(cfg.URL)
	if err != nil || base.Scheme != "https" || base.Hostname() == "" || base.User != nil || base.RawQuery != "" || base.Fragment != "" {
		return nil, fmt.Errorf("repository %.200q: want an https URL without user, query or fragment", cfg.URL)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	st, err := os.Stat(cfg.Dir)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("%s has mode %04o: others could make this node forget what it has seen; chmod 700 it", cfg.Dir, st.Mode().Perm())
	}
	// The name binds the cache to the shipped root: an operator who moves to
	// another network begins anew, and one who moves back finds what was known.
	c := &Client{
		root: slices.Clone(cfg.Root),
		base: base,
		http: restrict(cfg.Client),
		now:  cfg.Now,
		dir:  cfg.Dir,
		file: filepath.Join(cfg.Dir, digest.Of(cfg.Root).Hex()+suffix),
		busy: make(chan struct{}, 1),
	}
	if c.now == nil {
		c.now = time.Now
	}
	return c, c.sweep()
}

// Refresh asks the network for the newest configuration, verifies it and
// remembers it.
//
// Every file is bounded in size and time, the whole in time, and ctx ends it
// early. A
// configuration that is properly signed but unusable ([snapshot.ErrInvalid])
// does not become the last one: the node needs something it can run after a
// restart, and a mistake in a configuration must not take away the one before.
// Its metadata is remembered nevertheless, so an older one cannot be played
// back afterwards.
//
// A cache that is damaged is not needed: the refresh begins from the shipped
// root, as on the first day, and replaces it.
func (c *Client) Refresh(ctx context.Context) (*snapshot.Snapshot, error) {
	select {
	case c.busy <- struct{}{}:
		defer func() { <-c.busy }()
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, context.Cause(ctx))
	}
	st, err := c.load()
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, snapshot.ErrUntrusted) {
		st = &state{Roots: [][]byte{c.root}}
	} else if err != nil {
		return nil, err
	}
	ref := c.now()
	if st.Last != nil {
		_, err := st.Last.open(st.Roots)
		switch {
		case errors.Is(err, snapshot.ErrUntrusted):
			st = &state{Roots: [][]byte{c.root}}
		case st.Last.At.After(ref):
			// Time does not run backwards: a clock that was set back must not
			// revive what has expired. No wrong clock gets in here for long,
			// since all of the set was valid at that time.
			ref = st.Last.At
		}
	}
	trusted, err := chain.Begin(st.Roots, ref)
	if err != nil {
		st = &state{Roots: [][]byte{c.root}}
		if trusted, err = chain.Begin(st.Roots, ref); err != nil {
			return nil, err
		}
	}
	seen := *st
	bounded, cancel := context.WithTimeoutCause(ctx, refreshTimeout, fmt.Errorf("not complete after %v", refreshTimeout))
	defer cancel()
	s, err := c.update(bounded, trusted, st)
	// One write, whatever came out: the roots and the versions that were
	// verified count even where a later step failed.
	if !st.equal(&seen) {
		if err2 := c.save(st); err2 != nil {
			return nil, errors.Join(err, fmt.Errorf("keep what was verified: %w", err2))
		}
	}
	return s, err
}

// update is steps 5.3 to 5.7 of the workflow. It puts into st whatever has
// been verified, also when it fails.
func (c *Client) update(ctx context.Context, trusted *trustedmetadata.TrustedMetadata, st *state) (*snapshot.Snapshot, error) {
	if err := c.updateRoot(ctx, trusted, st); err != nil {
		return nil, err
	}
	if err := c.updateTimestamp(ctx, trusted, st); err != nil {
		return nil, err
	}
	if err := c.updateSnapshot(ctx, trusted, st); err != nil {
		return nil, err
	}
	if err := c.updateTargets(ctx, trusted, st); err != nil {
		return nil, err
	}
	raw, err := c.config(ctx, trusted, st)
	if err != nil {
		return nil, err
	}
	s, err := open(trusted, raw)
	if err != nil {
		return nil, err
	}
	last := &set{At: trusted.RefTime, Root: len(st.Roots) - 1, Timestamp: st.Timestamp, Snapshot: st.Snapshot, Targets: st.Targets, Config: raw}
	// An unchanged set keeps the time at which it was verified first.
	if st.Last == nil || !st.Last.equal(last) {
		st.Last = last
	}
	return s, nil
}

func (c *Client) updateRoot(ctx context.Context, trusted *trustedmetadata.TrustedMetadata, st *state) error {
	for {
		name := fmt.Sprintf("metadata/%d.root.json", trusted.Root.Signed.Version+1)
		raw, err := c.fetch(ctx, name, chain.MaxRoot)
		if errors.Is(err, errAbsent) {
			return nil // the one we have is the newest
		}
		if err != nil {
			return err
		}
		if len(st.Roots) > maxRoots {
			return fmt.Errorf("%w: %w: more than %d roots after the shipped one: install a newer package", snapshot.ErrUntrusted, ErrTooLarge, maxRoots)
		}
		if err := chain.Root(trusted, raw); err != nil {
			return chain.Refusal(name, err)
		}
		st.Roots = append(slices.Clip(st.Roots), raw)
	}
}

func (c *Client) updateTimestamp(ctx context.Context, trusted *trustedmetadata.TrustedMetadata, st *state) error {
	const name = "metadata/timestamp.json"
	if st.Timestamp != nil {
		// For comparison only. It may have expired, which is normal, or be
		// signed by a key that is no longer listed, and then counts no more.
		_ = chain.Timestamp(trusted, st.Timestamp)
	}
	raw, err := c.fetch(ctx, name, chain.MaxTimestamp)
	if err != nil {
		return err
	}
	err = chain.Timestamp(trusted, raw)
	if errors.Is(err, &metadata.ErrEqualVersionNumber{}) {
		return nil // updateSnapshot refuses it should it have expired
	}
	if err != nil {
		return chain.Refusal(name, err)
	}
	st.Timestamp = raw
	return nil
}

func (c *Client) updateSnapshot(ctx context.Context, trusted *trustedmetadata.TrustedMetadata, st *state) error {
	meta := trusted.Timestamp.Signed.Meta["snapshot.json"] // chain.Timestamp made sure of it
	name := fmt.Sprintf("metadata/%d.snapshot.json", meta.Version)
	if st.Snapshot != nil {
		// For comparison, and to go on with if it is still the one.
		if chain.Snapshot(trusted, st.Snapshot, true) == nil && meta.VerifyLengthHashes(st.Snapshot) == nil {
			return nil
		}
	}
	raw, err := c.fetch(ctx, name, meta.Length)
	if err != nil {
		return err
	}
	if err := chain.Snapshot(trusted, raw, false); err != nil {
		return chain.Refusal(name, err)
	}
	st.Snapshot = raw
	return nil
}

func (c *Client) updateTargets(ctx context.Context, trusted *trustedmetadata.TrustedMetadata, st *state) error {
	meta := trusted.Snapshot.Signed.Meta["targets.json"] // chain.Snapshot made sure of it
	name := fmt.Sprintf("metadata/%d.targets.json", meta.Version)
	if st.Targets != nil && chain.Targets(trusted, st.Targets) == nil {
		return nil
	}
	raw, err := c.fetch(ctx, name, meta.Length)
	if err != nil {
		return err
	}
	if err := chain.Targets(trusted, raw); err != nil {
		return chain.Refusal(name, err)
	}
	st.Targets = raw
	return nil
}

// config returns the bytes that the verified targets metadata names.
func (c *Client) config(ctx context.Context, trusted *trustedmetadata.TrustedMetadata, st *state) ([]byte, error) {
	info := trusted.Targets[metadata.TARGETS].Signed.Targets[snapshot.Target]
	if info == nil {
		return nil, fmt.Errorf("%w: %w: the targets metadata does not name %s", snapshot.ErrUntrusted, ErrMalformed, snapshot.Target)
	}
	d, err := digest.ParseHex(info.Hashes["sha256"].String())
	if err != nil {
		return nil, fmt.Errorf("%w: %w: sha256 of %s: %w", snapshot.ErrUntrusted, ErrMalformed, snapshot.Target, err)
	}
	if st.Last != nil && d.Check(st.Last.Config) == nil {
		return st.Last.Config, nil
	}
	if info.Length < 0 || info.Length > snapshot.MaxSize {
		return nil, fmt.Errorf("%w: %s has %d bytes, at most %d", snapshot.ErrInvalid, snapshot.Target, info.Length, snapshot.MaxSize)
	}
	return c.fetch(ctx, "targets/"+d.Hex()+"."+snapshot.Target, info.Length)
}

// Last returns the last configuration that was verified and usable, from disk
// alone. It verifies everything again, with the reference time at which it was
// valid: that time has passed is what [snapshot.Snapshot.Expires] tells, not a
// reason to stop. Fails with [fs.ErrNotExist] when there is none, and with
// [snapshot.ErrUntrusted] when a single byte of it has changed.
//
// It is verified with the root of its time. A newer root that lists other keys
// does not take it away: a node that cannot reach the network must keep
// running what the network last gave it.
func (c *Client) Last() (*snapshot.Snapshot, error) {
	st, err := c.load()
	if err != nil {
		return nil, err
	}
	if st.Last == nil {
		return nil, fmt.Errorf("no configuration was verified yet: %w", fs.ErrNotExist)
	}
	return st.Last.open(st.Roots)
}

// open verifies the set.
func (l *set) open(roots [][]byte) (*snapshot.Snapshot, error) {
	trusted, err := chain.Verify(roots[:l.Root+1], l.At, l.Timestamp, l.Snapshot, l.Targets)
	if err != nil {
		return nil, err
	}
	return open(trusted, l.Config)
}

// open makes the snapshot, and names what is wrong with its bytes.
func open(trusted *trustedmetadata.TrustedMetadata, raw []byte) (*snapshot.Snapshot, error) {
	s, err := snapshot.Open(trusted, raw)
	if errors.Is(err, snapshot.ErrUntrusted) {
		err = chain.Refusal(snapshot.Target, err)
	}
	return s, err
}
