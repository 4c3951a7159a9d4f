// Package publish owns the operator's side of the network's TUF repository: its
// keys, its metadata, and the web server's view of it.
//
// The rule it keeps: nothing becomes visible that a node would refuse. What is
// about to be published is first verified as nodes verify it, from the root
// that they have, and written so that a reader at any instant sees the old
// state or the new one: files with a version in their name first,
// timestamp.json last.
//
// # Layout
//
//	DIR/publish.json                          lifetimes
//	DIR/lock                                  held while something is published; who reads needs none
//	DIR/keys/ROLE.pem                         snapshot, timestamp; 0600
//	DIR/keys/targets.pem, root-N.pem          unless they lie elsewhere
//	DIR/repository/metadata/*.json            what [Handler] serves,
//	DIR/repository/targets/SHA256.config.json with the private part out of reach
//
// Root keys are needed for [Init] and to sign a [Proposal] only, the targets key
// for [Publish]: both belong on other media in between. [Refresh], which keeps a
// repository fresh day by day, needs the snapshot's and the timestamp's. Whoever
// has the three of a publication can publish for the network until the root is
// rotated; whoever has those two alone can keep nodes from news, no more.
//
// Nodes refuse what is older than what they have seen, so a repository that was
// restored from a backup is refused until it has caught up. A root with new keys
// for all three makes nodes forget what they saw of the old ones.
//
// # The next root
//
// A change of root keys, thresholds or online keys, and each renewal, is a
// ceremony in three steps, of which only the first and the last need DIR:
// [Propose] writes down the next root, each holder looks at [Proposal.Review] on a
// machine of their own and signs, and [Adopt] publishes what enough of them have
// signed.
//
// The functions may be called from several processes at once.
package publish

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/resultity/node/internal/chain"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/snapshot"
)

// ErrNothing says that no configuration has been published yet.
var ErrNothing = errors.New("no configuration has been published")

// Lifetimes say for how long metadata is valid after it was signed. A short
// timestamp bounds how long an attacker on the path can hide news from a node;
// it must be longer than the publisher may be out of order.
type Lifetimes struct {
	Root, Targets, Snapshot, Timestamp time.Duration
}

// DefaultLifetimes are for a network in production.
var DefaultLifetimes = Lifetimes{
	Root:      365 * 24 * time.Hour,
	Targets:   90 * 24 * time.Hour,
	Snapshot:  7 * 24 * time.Hour,
	Timestamp: 24 * time.Hour,
}

// Options are for [Init] and [Prepare]. The zero value is a root of 2 of 3 keys in
// DIR/keys and the default lifetimes.
type Options struct {
	RootKeys   []string   // files of the root keys, made when missing
	Holders    []Public   // for Prepare, instead: the root keys, which their holders have made
	Threshold  int        // how many of them must sign a root; 0 means more than half
	TargetsKey string     // file of the targets key, made when missing; "" means DIR/keys/targets.pem
	Targets    Public     // instead: the targets key, which lies elsewhere
	Passphrase Passphrase // for root and targets keys; the others must be at hand at any time
	Lifetimes  Lifetimes  // zero fields mean the default
}

// settings is publish.json.
type settings struct {
	RootSeconds      int64 `json:"root_s"`
	TargetsSeconds   int64 `json:"targets_s"`
	SnapshotSeconds  int64 `json:"snapshot_s"`
	TimestampSeconds int64 `json:"timestamp_s"`
}

// online are the roles that sign at every publication.
var online = []string{metadata.TARGETS, metadata.SNAPSHOT, metadata.TIMESTAMP}

// Init makes a new network's keys and its first root, and writes it to
// DIR/repository/metadata/1.root.json, which is what the node's package ships.
// Nodes find no configuration until the first [Publish].
//
// It fails with [fs.ErrExist] when there is a root already. Keys that exist are
// used, so a call that was cut short can be repeated.
func Init(dir string, o Options) error {
	if o.RootKeys == nil {
		for n := range 3 {
			o.RootKeys = append(o.RootKeys, filepath.Join(dir, "keys", fmt.Sprintf("root-%d.pem", n+1)))
		}
	}
	if err := makeDirs(dir); err != nil {
		return err
	}
	var keys []*Key
	o.Holders = nil
	for _, name := range o.RootKeys {
		k, err := MakeKey(name, o.Passphrase)
		if err != nil {
			return err
		}
		keys = append(keys, k)
		o.Holders = append(o.Holders, k.Public(strings.TrimSuffix(filepath.Base(name), ".pem")))
	}
	p, err := Prepare(dir, o)
	if err != nil {
		return err
	}
	var sigs []*Signature
	for _, k := range keys {
		s, err := p.Sign(k)
		if err != nil {
			return err
		}
		sigs = append(sigs, s)
	}
	return Adopt(dir, p, sigs)
}

// Prepare does what [Init] does, but for the first root: it returns that one, for
// its holders to sign and [Adopt] to publish.
func Prepare(dir string, o Options) (*Proposal, error) {
	s, err := o.Lifetimes.settings()
	if err != nil {
		return nil, err
	}
	if o.Threshold == 0 {
		o.Threshold = len(o.Holders)/2 + 1
	}
	if err := makeDirs(dir); err != nil {
		return nil, err
	}
	r, err := lock(dir)
	if err != nil {
		return nil, err
	}
	defer r.unlock()
	n, err := r.newest(metadata.ROOT)
	if err != nil {
		return nil, err
	}
	if n != 0 {
		return nil, fmt.Errorf("%s: root %d: %w", dir, n, fs.ErrExist)
	}
	root := metadata.Root(expiry(s.RootSeconds))
	if err := setRole(&root.Signed, metadata.ROOT, o.Threshold, o.Holders...); err != nil {
		return nil, err
	}
	for _, role := range online {
		public := o.Targets
		if role != metadata.TARGETS || public.key == nil {
			name, pass := r.keyFile(role), Passphrase(nil)
			if role == metadata.TARGETS {
				pass = o.Passphrase
				if o.TargetsKey != "" {
					name = o.TargetsKey
				}
			}
			k, err := MakeKey(name, pass)
			if err != nil {
				return nil, err
			}
			public = k.Public("")
		}
		if err := setRole(&root.Signed, role, 1, public); err != nil {
			return nil, err
		}
	}
	raw, err := unsigned(root)
	if err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, err
	}
	failpoint.Here("publish.settings.begin")
	if err := durable.WriteFile(filepath.Join(dir, "publish.json"), append(b, '\n'), 0o644); err != nil {
		return nil, err
	}
	return &Proposal{Next: raw}, nil
}

func makeDirs(dir string) error {
	for name, mode := range map[string]fs.FileMode{"": 0o755, "keys": 0o700, "repository": 0o755, "repository/metadata": 0o755, "repository/targets": 0o755} {
		if err := os.MkdirAll(filepath.Join(dir, name), mode); err != nil {
			return err
		}
	}
	return nil
}

// Publish makes config the network's configuration. keys are those that do not
// lie in DIR/keys. It fails with [snapshot.ErrInvalid], and changes nothing, when
// nodes would refuse it.
func Publish(dir string, config []byte, keys ...*Key) error {
	if _, err := snapshot.Parse(config); err != nil {
		return err
	}
	r, err := open(dir)
	if err != nil {
		return err
	}
	defer r.unlock()
	seen, err := r.current()
	if err != nil && !errors.Is(err, ErrNothing) {
		return err
	}
	extra, err := rolesOf(keys, &r.root.Signed)
	if err != nil {
		return err
	}
	n, err := r.build(seen, change{config: config, targets: true, extra: extra})
	if err != nil {
		return err
	}
	if err := n.check(r.rootRaw); err != nil {
		return err
	}
	return r.show(n)
}

// Expiries say until when the newest metadata is valid. Root, and targets if
// its key is kept offline, need the operator before their time.
type Expiries struct {
	Root, Targets, Snapshot, Timestamp time.Time
}

// Refresh signs the timestamp anew, and the snapshot and targets metadata once
// half of their lifetime is over; targets only where its key is at hand. Call
// it several times per lifetime of the timestamp. It fails with [ErrNothing]
// before the first [Publish].
func Refresh(dir string) (Expiries, error) {
	r, err := open(dir)
	if err != nil {
		return Expiries{}, err
	}
	defer r.unlock()
	seen, err := r.current()
	if err != nil {
		return Expiries{}, err
	}
	c := change{
		config:   seen.config,
		targets:  halfway(seen.targets.meta.Signed.Expires, r.TargetsSeconds),
		snapshot: halfway(seen.snapshot.meta.Signed.Expires, r.SnapshotSeconds),
	}
	// To keep the targets key offline is a choice, and no reason to let the
	// timestamp expire.
	if c.targets {
		if _, err := r.key(metadata.TARGETS); elsewhere(err) {
			c.targets = false
		}
	}
	n, err := r.build(seen, c)
	if err != nil {
		return Expiries{}, err
	}
	if err := n.check(r.rootRaw); err != nil {
		return Expiries{}, err
	}
	if err := r.show(n); err != nil {
		return Expiries{}, err
	}
	return Expiries{
		Root:      r.root.Signed.Expires,
		Targets:   n.targets.meta.Signed.Expires,
		Snapshot:  n.snapshot.meta.Signed.Expires,
		Timestamp: n.timestamp.meta.Signed.Expires,
	}, nil
}

// repository is a directory with its newest root.
type repository struct {
	dir  string
	lock *os.File // nil for who only reads
	settings
	rootRaw []byte
	root    *metadata.Metadata[metadata.RootType]
}

// lockTime is how long a publisher waits for another one. It is less than a
// service manager gives the service, which publishes too, between signs of life.
const lockTime = 10 * time.Second

// lock waits until no other process publishes, but no longer than lockTime.
func lock(dir string) (*repository, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for begun := time.Now(); ; time.Sleep(time.Millisecond) { // flock itself waits without end
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return &repository{dir: dir, lock: f}, nil
		}
		if errors.Is(err, syscall.EWOULDBLOCK) {
			if time.Since(begun) < lockTime {
				continue
			}
			err = fmt.Errorf("another process has been publishing for %v, which may hang: fuser names it (%w)", lockTime, err)
		}
		_ = f.Close() // nothing was written
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
}

func (r *repository) unlock() { _ = r.lock.Close() } // closing is what unlocks

// open locks a repository that has a root.
func open(dir string) (*repository, error) {
	r, err := prepared(dir)
	if err != nil {
		return nil, err
	}
	if err := r.begun(); err != nil {
		r.unlock()
		return nil, err
	}
	return r, nil
}

// prepared is open for a repository that may have no root yet.
func prepared(dir string) (*repository, error) {
	r, err := lock(dir)
	if err != nil {
		return nil, err
	}
	r.sweep()
	if err := r.load(); err != nil {
		r.unlock()
		return nil, err
	}
	return r, nil
}

// look is open for who only reads: like a node, it needs no lock, and a publisher
// that hangs does not hold it up.
func look(dir string) (*repository, error) {
	r := &repository{dir: dir}
	if err := r.load(); err != nil {
		return nil, err
	}
	return r, r.begun()
}

func (r *repository) begun() error {
	if r.root == nil {
		return fmt.Errorf("%s has no root yet: its holders have to sign the first one, and root publish to publish it: %w", r.dir, fs.ErrNotExist)
	}
	return nil
}

// load reads the settings, and the newest root if there is one.
func (r *repository) load() error {
	name := filepath.Join(r.dir, "publish.json")
	b, err := durable.ReadFile(name, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s holds no repository: run init first: %w", r.dir, err)
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &r.settings); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := r.settings.check(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	n, err := r.newest(metadata.ROOT)
	if err != nil || n == 0 {
		return err
	}
	if r.rootRaw, err = r.read(fmt.Sprintf("metadata/%d.root.json", n)); err != nil {
		return err
	}
	r.root, err = metadata.Root().FromBytes(r.rootRaw)
	return err
}

// sweep removes what writers that were killed have left beside the files, as far
// as this process may.
func (r *repository) sweep() {
	for _, in := range []string{"repository/metadata", "repository/targets", "keys"} {
		left, _ := filepath.Glob(filepath.Join(r.dir, in, "*.tmp*")) // the pattern is right
		for _, name := range left {
			_ = os.Remove(name) // it is in nobody's way
		}
	}
}

func (r *repository) path(name string) string    { return filepath.Join(r.dir, "repository", name) }
func (r *repository) keyFile(role string) string { return filepath.Join(r.dir, "keys", role+".pem") }

// maxFile bounds publish.json and each file of a repository, in bytes: none has more
// than a configuration may have.
const maxFile = snapshot.MaxSize

func (r *repository) read(name string) ([]byte, error) {
	return durable.ReadFile(r.path(name), maxFile)
}

func (r *repository) write(name string, b []byte) error {
	failpoint.Here("publish.file.begin")
	return durable.WriteFile(r.path(name), b, 0o644)
}

var versioned = regexp.MustCompile(`^([1-9][0-9]{0,17})\.(root|targets|snapshot)\.json$`)

// newest returns the highest version of role that is on disk, or 0. A version
// that a crash left behind unreferenced counts, so that no name is ever used
// for two contents: what is versioned may be cached for ever.
func (r *repository) newest(role string) (int64, error) {
	entries, err := os.ReadDir(r.path("metadata"))
	if err != nil {
		return 0, err
	}
	var n int64
	for _, e := range entries {
		if m := versioned.FindStringSubmatch(e.Name()); m != nil && m[2] == role {
			v, err := strconv.ParseInt(m[1], 10, 64)
			if err != nil {
				return 0, err
			}
			n = max(n, v)
		}
	}
	return n, nil
}

// file is metadata with the bytes that it is published as.
type file[T metadata.Roles] struct {
	meta *metadata.Metadata[T]
	raw  []byte
}

// newer is a set that can be published; the parts that are on disk already are
// among it.
type newer struct {
	timestamp file[metadata.TimestampType]
	snapshot  file[metadata.SnapshotType]
	targets   file[metadata.TargetsType]
	config    []byte
}

func (n *newer) configName() string {
	return "targets/" + digest.Of(n.config).Hex() + "." + snapshot.Target
}

// change says what a set to publish has that the one before has not. A
// timestamp is always new; new targets metadata needs a new snapshot.
type change struct {
	config            []byte
	targets, snapshot bool
	extra             map[string][]*Key // further signers, by role
}

func halfway(expires time.Time, lifetime int64) bool {
	return time.Until(expires) < time.Duration(lifetime)*time.Second/2
}

// build makes the set that follows seen, which is nil at first.
func (r *repository) build(seen *newer, c change) (*newer, error) {
	n := &newer{config: c.config}
	var timestamp int64
	if seen != nil {
		timestamp, n.targets, n.snapshot = seen.timestamp.meta.Signed.Version, seen.targets, seen.snapshot
	}
	var err error
	if c.targets {
		t := metadata.Targets(expiry(r.TargetsSeconds))
		if t.Signed.Version, err = r.next(metadata.TARGETS); err != nil {
			return nil, err
		}
		if t.Signed.Targets[snapshot.Target], err = metadata.TargetFile().FromBytes(snapshot.Target, c.config, "sha256"); err != nil {
			return nil, err
		}
		if n.targets, err = sign(r, metadata.TARGETS, t, c.extra); err != nil {
			return nil, err
		}
	}
	if c.targets || c.snapshot {
		s := metadata.Snapshot(expiry(r.SnapshotSeconds))
		if s.Signed.Version, err = r.next(metadata.SNAPSHOT); err != nil {
			return nil, err
		}
		s.Signed.Meta["targets.json"] = describe(n.targets.meta.Signed.Version, n.targets.raw)
		if n.snapshot, err = sign(r, metadata.SNAPSHOT, s, c.extra); err != nil {
			return nil, err
		}
	}
	t := metadata.Timestamp(expiry(r.TimestampSeconds))
	t.Signed.Version = timestamp + 1
	t.Signed.Meta["snapshot.json"] = describe(n.snapshot.meta.Signed.Version, n.snapshot.raw)
	n.timestamp, err = sign(r, metadata.TIMESTAMP, t, c.extra)
	return n, err
}

func (r *repository) next(role string) (int64, error) {
	n, err := r.newest(role)
	return n + 1, err
}

// current reads the set that timestamp.json leads to.
func (r *repository) current() (*newer, error) {
	n := new(newer)
	var err error
	n.timestamp.raw, err = r.read("metadata/timestamp.json")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNothing
	}
	if err != nil {
		return nil, err
	}
	if n.timestamp.meta, err = metadata.Timestamp().FromBytes(n.timestamp.raw); err != nil {
		return nil, err
	}
	m := n.timestamp.meta.Signed.Meta["snapshot.json"]
	if m == nil {
		return nil, errors.New("timestamp.json does not name snapshot.json")
	}
	if n.snapshot.raw, err = r.read(fmt.Sprintf("metadata/%d.snapshot.json", m.Version)); err != nil {
		return nil, err
	}
	if n.snapshot.meta, err = metadata.Snapshot().FromBytes(n.snapshot.raw); err != nil {
		return nil, err
	}
	if m = n.snapshot.meta.Signed.Meta["targets.json"]; m == nil {
		return nil, errors.New("snapshot.json does not name targets.json")
	}
	if n.targets.raw, err = r.read(fmt.Sprintf("metadata/%d.targets.json", m.Version)); err != nil {
		return nil, err
	}
	if n.targets.meta, err = metadata.Targets().FromBytes(n.targets.raw); err != nil {
		return nil, err
	}
	info := n.targets.meta.Signed.Targets[snapshot.Target]
	if info == nil {
		return nil, fmt.Errorf("targets.json does not name %s", snapshot.Target)
	}
	n.config, err = r.read("targets/" + info.Hashes["sha256"].String() + "." + snapshot.Target)
	return n, err
}

// verify opens the set as a node does that has root.
func (n *newer) verify(root []byte) (*snapshot.Snapshot, error) {
	trusted, err := chain.Verify([][]byte{root}, time.Now(), n.timestamp.raw, n.snapshot.raw, n.targets.raw)
	if err != nil {
		return nil, err
	}
	return snapshot.Open(trusted, n.config)
}

// check verifies a set that is not visible yet.
func (n *newer) check(root []byte) error {
	if _, err := n.verify(root); err != nil {
		return fmt.Errorf("nodes would refuse what was about to be published: %w", err)
	}
	return nil
}

// show writes the set, timestamp.json last: until then nothing refers to the
// other files.
func (r *repository) show(n *newer) error {
	for _, f := range []struct {
		name string
		raw  []byte
	}{
		{n.configName(), n.config},
		{fmt.Sprintf("metadata/%d.targets.json", n.targets.meta.Signed.Version), n.targets.raw},
		{fmt.Sprintf("metadata/%d.snapshot.json", n.snapshot.meta.Signed.Version), n.snapshot.raw},
		{"metadata/timestamp.json", n.timestamp.raw},
	} {
		if old, err := r.read(f.name); err == nil && slices.Equal(old, f.raw) {
			continue
		}
		if err := r.write(f.name, f.raw); err != nil {
			return err
		}
	}
	return nil
}

// describe names a metadata file by version, length and hash: the version alone
// would let a server mix files of two repositories that share keys.
func describe(version int64, raw []byte) *metadata.MetaFiles {
	sum := digest.Of(raw).Sum()
	return &metadata.MetaFiles{Version: version, Length: int64(len(raw)), Hashes: metadata.Hashes{"sha256": sum[:]}}
}

func expiry(seconds int64) time.Time {
	return time.Now().UTC().Truncate(time.Second).Add(time.Duration(seconds) * time.Second)
}

func (l Lifetimes) settings() (settings, error) {
	seconds := func(d, def time.Duration) int64 {
		if d == 0 {
			d = def
		}
		return int64(d / time.Second)
	}
	s := settings{
		RootSeconds:      seconds(l.Root, DefaultLifetimes.Root),
		TargetsSeconds:   seconds(l.Targets, DefaultLifetimes.Targets),
		SnapshotSeconds:  seconds(l.Snapshot, DefaultLifetimes.Snapshot),
		TimestampSeconds: seconds(l.Timestamp, DefaultLifetimes.Timestamp),
	}
	return s, s.check()
}

// maxLifetime is in seconds.
const maxLifetime = 10 * 365 * 24 * 60 * 60

func (s settings) check() error {
	for name, v := range map[string]int64{"root_s": s.RootSeconds, "targets_s": s.TargetsSeconds, "snapshot_s": s.SnapshotSeconds, "timestamp_s": s.TimestampSeconds} {
		if v < 1 || v > maxLifetime {
			return fmt.Errorf("lifetime %s is %d seconds, want 1 to %d", name, v, maxLifetime)
		}
	}
	return nil
}
