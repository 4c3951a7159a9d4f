package signer

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/receiptlog"
)

// Errors about counters.
var (
	// ErrCounters says that the file of the counters cannot be used. The key
	// must not sign then: it would begin to count anew.
	ErrCounters = errors.New("counters refused")

	// ErrTerms says that the key does not sign for a network or a chain.
	ErrTerms = errors.New("not a network or chain that this key signs for")
)

// epoch is where the counts of a key go on that was moved or restored on
// purpose: at the next multiple of it.
const epoch = 1 << 20

// Bounds of what a key counts for. They keep the file within its slots.
const (
	maxNetworks = 8
	maxChains   = 8
)

// Counters are the numbers of a key that never go back: how many times its
// signer has been started, the hellos for each network, and the receipt log of
// each, by its last head. Receipts are counted within one start, so that none of
// them waits for the disk. Safe for concurrent use.
//
// A head of the same era as the last one is taken with the proof that its log begins
// with the last one's, see [Growth]; one of a later era without the network's word for
// it, which who checks a proof looks for. A node whose disk was replaced goes on from
// its network's copy of the log. Should that lack what the last head had, it has no
// heads until its network has the log begin anew; it works all the while. A takeover
// forgets no head: whoever has the agent can ask for one.
//
// The file has two slots of fixed size that are written in turn, so that a torn
// write leaves the other one, and that a full disk is no reason not to write. A slot
// that is not whole may have been the newest, and what it counted may have been signed:
// if one byte of it was changed, that is found again by its checksum; if not, the counts
// go on behind those that it may have had.
type Counters struct {
	mu       sync.Mutex // guards what follows, and the writes to file
	file     *os.File   // nil for counters that end with the process
	turn     uint64     // of the last write
	mended   []byte     // slot of that turn, if it was not whole as it was read
	now      Counts
	receipts map[uint64]uint32 // of this start, by chain
	allowed  map[string]uint64 // networks and their chains; nil for what was first asked for
}

// Allow has the key sign for these networks, and for their chains, and for no
// others. Without it, the first few that are asked for are those. To be called
// before anything is signed.
func (c *Counters) Allow(networks map[string]uint64) { c.allowed = networks }

// Counts are what the file holds.
type Counts struct {
	Node     evm.Address       `json:"node"`
	Starts   uint64            `json:"starts"`
	Networks map[string]uint64 `json:"networks"` // hellos
	Chains   []uint64          `json:"chains"`   // that receipts were signed for
	Heads    map[string]Log    `json:"heads"`    // the last head for each network
}

// Log is what a head has stated.
type Log struct {
	Era  uint64   `json:"era"`
	Size uint64   `json:"size"`
	Root evm.Hash `json:"root"`
}

// LogOf returns what a head states.
func LogOf(h *receiptlog.Head) Log { return Log{h.Era, h.Size, h.Root} }

// Behind reports whether a log comes behind another one: it is longer, or of a later era.
func (l Log) Behind(last Log) bool {
	return l.Era > last.Era || l.Era == last.Era && l.Size > last.Size
}

const slotSize = 4096

// OpenCounters opens the counters of a key, which are made where there are none,
// and counts a start. Starts begin with the time in seconds: where the file was
// lost, no receipt gets a sequence for the second time.
func OpenCounters(name string, node evm.Address) (*Counters, error) {
	c := &Counters{receipts: map[uint64]uint32{}, now: Counts{Node: node, Networks: map[string]uint64{}}}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		failpoint.Here("signer.counters.begin")
		if err := durable.WriteFile(name, make([]byte, 2*slotSize), 0o600); err != nil {
			return nil, err
		}
		failpoint.Here("signer.counters.made")
		f, err = os.OpenFile(name, os.O_RDWR, 0)
	}
	if err != nil {
		return nil, err
	}
	c.file = f
	if err := c.load(node); err != nil {
		_ = f.Close() // the error says more
		return nil, fmt.Errorf("%s: %w", filepath.Base(name), err)
	}
	next := c.now.clone()
	next.Starts++
	// Before the other slot is written, this one has to be right.
	err = c.put(c.turn, c.mended)
	if err == nil {
		err = c.write(next)
	}
	if err != nil {
		_ = f.Close() // the error says more
		return nil, err
	}
	return c, nil
}

// load reads the counts of a key, or begins them.
func (c *Counters) load(node evm.Address) error {
	if err := c.read(); err != nil {
		return err
	}
	if c.turn == 0 {
		c.now.Node, c.now.Starts = node, uint64(time.Now().Unix())
	}
	if c.now.Node != node {
		return fmt.Errorf("%w: they belong to node %s, and the key to %s", ErrCounters, c.now.Node, node)
	}
	return nil
}

// read reads the newer of the slots that are whole. One that was made and not
// written yet leaves turn at 0.
func (c *Counters) read() error {
	raw := make([]byte, 2*slotSize+1)
	n, _ := c.file.ReadAt(raw, 0) // a short read shows in its length
	return c.parse(raw[:n])
}

func (c *Counters) parse(raw []byte) error {
	n := len(raw)
	if n != 2*slotSize {
		return fmt.Errorf("%w: %d bytes, want %d; restore the file, or see resultityctl identity takeover", ErrCounters, n, 2*slotSize)
	}
	if bytes.Equal(raw, make([]byte, n)) {
		return nil
	}
	slots := [2][]byte{raw[:slotSize], raw[slotSize:n]}
	whole := 0
	for _, b := range slots {
		turn, v, ok := parseSlot(b)
		if ok {
			whole++
		}
		if ok && turn > c.turn {
			c.turn, c.now = turn, v
		}
	}
	newest := c.turn + 1
	if b := slots[newest%2]; whole == 1 && (newest > 2 || !bytes.Equal(b, make([]byte, slotSize))) { // the first write leaves a slot empty
		switch turn, v := mendSlot(b, newest); turn {
		case 0:
			c.now = c.now.Takeover() // which may be what was written
		case newest: // else it was the older one
			c.turn, c.now, c.mended = turn, v, b
		}
	}
	if c.turn == 0 {
		return fmt.Errorf("%w: they are damaged; restore the file, or remove it and take the key over (resultityctl identity takeover)", ErrCounters)
	}
	return nil
}

// A slot is turn, length and checksum of what follows, and that.
const slotHeader = 8 + 4 + 4

func parseSlot(b []byte) (turn uint64, v Counts, ok bool) {
	turn = binary.BigEndian.Uint64(b)
	size := binary.BigEndian.Uint32(b[8:])
	if turn == 0 || size > slotSize-slotHeader {
		return 0, v, false
	}
	body := b[slotHeader : slotHeader+size]
	if crc32.ChecksumIEEE(append(b[:12:12], body...)) != binary.BigEndian.Uint32(b[12:]) {
		return 0, v, false
	}
	err := json.Unmarshal(body, &v)
	if v.Networks == nil {
		v.Networks = map[string]uint64{}
	}
	return turn, v, err == nil
}

// mendSlot finds the one byte whose change makes b the slot of a turn again, or of the one
// that was there before. It returns 0 for neither.
func mendSlot(b []byte, newest uint64) (uint64, Counts) {
	for i, was := range b {
		for x := 1; x < 256; x++ {
			b[i] = was ^ byte(x)
			if turn, v, ok := parseSlot(b); ok && (turn == newest || turn == newest-2) {
				return turn, v
			}
		}
		b[i] = was
		if i >= slotHeader && len(bytes.TrimRight(b[i:], "\x00")) == 0 {
			break // nothing follows
		}
	}
	return 0, Counts{}
}

func formatSlot(turn uint64, v Counts) ([]byte, error) {
	body, err := json.Marshal(&v)
	if err != nil {
		return nil, err
	}
	if len(body) > slotSize-slotHeader {
		return nil, fmt.Errorf("%w: %d bytes", ErrCounters, len(body))
	}
	b := make([]byte, slotSize)
	binary.BigEndian.PutUint64(b, turn)
	binary.BigEndian.PutUint32(b[8:], uint32(len(body)))
	copy(b[slotHeader:], body)
	binary.BigEndian.PutUint32(b[12:], crc32.ChecksumIEEE(append(b[:12:12], body...)))
	return b, nil
}

// write makes next the counts, on disk first. Called with mu held, or before
// anybody else has c.
func (c *Counters) write(next Counts) error {
	if c.file != nil {
		turn := c.turn + 1
		b, err := formatSlot(turn, next)
		if err != nil {
			return err
		}
		failpoint.Here("signer.count.begin")
		if err := c.put(turn, b); err != nil {
			return err
		}
		failpoint.Here("signer.count.synced")
		c.turn = turn
	}
	c.now = next
	return nil
}

// put writes the slot of a turn, if there is one to write.
func (c *Counters) put(turn uint64, slot []byte) error {
	if slot == nil {
		return nil
	}
	_, err := c.file.WriteAt(slot, int64(turn%2)*slotSize)
	if err == nil {
		err = c.file.Sync()
	}
	if err != nil {
		return fmt.Errorf("write down the key's counters: %w", err)
	}
	return nil
}

func (v Counts) clone() Counts {
	v.Networks, v.Chains, v.Heads = maps.Clone(v.Networks), slices.Clone(v.Chains), maps.Clone(v.Heads)
	return v
}

var networkPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

// hello counts one hello for a network.
func (c *Counters) hello(network string) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.may(network); err != nil {
		return 0, err
	}
	next := c.now.clone()
	next.Networks[network]++
	return next.Networks[network], c.write(next)
}

// network writes a network down at its first use.
func (c *Counters) network(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, known := c.now.Networks[name]; known {
		return nil
	}
	if err := c.may(name); err != nil {
		return err
	}
	next := c.now.clone()
	next.Networks[name] = 0
	return c.write(next)
}

// may says whether the key signs for a network.
func (c *Counters) may(network string) error {
	_, known := c.now.Networks[network]
	switch {
	case c.allowed != nil:
		if _, ok := c.allowed[network]; !ok {
			return fmt.Errorf("%w: network %.80q", ErrTerms, network)
		}
	case known:
	case !networkPattern.MatchString(network):
		return fmt.Errorf("%w: network %.80q", ErrTerms, network)
	case len(c.now.Networks) >= maxNetworks:
		return fmt.Errorf("%w: network %s would be one more than %d", ErrTerms, network, maxNetworks)
	}
	return nil
}

// lastHead is what the last head of a network has stated.
func (c *Counters) lastHead(network string) (Log, bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.may(network); err != nil {
		return Log{}, false, err
	}
	last, known := c.now.Heads[network]
	return last, known, nil
}

// head writes down that a head is the last one of its network, if it grows from the
// one before.
func (c *Counters) head(chain uint64, h *receiptlog.Head, g Growth) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.may(h.Network); err != nil {
		return err
	}
	if own, ok := c.allowed[h.Network]; ok && own != chain {
		return fmt.Errorf("%w: chain %d for network %s", ErrTerms, chain, h.Network)
	}
	if err := c.admit(chain); err != nil {
		return err
	}
	next, is := c.now.clone(), LogOf(h)
	last, known := next.Heads[h.Network]
	if known && is == last {
		return nil
	}
	if g.Since != nil && (!known || LogOf(&g.Since.Head).Behind(last)) {
		last, known = LogOf(&g.Since.Head), true
	}
	switch {
	case !known, is == last:
	case !is.Behind(last):
		return fmt.Errorf("%w: of %d receipts in era %d, and is asked for %d in era %d", ErrBehind, last.Size, last.Era, is.Size, is.Era)
	case is.Era == last.Era:
		was := receiptlog.Head{Node: h.Node, Network: h.Network, Era: last.Era, Size: last.Size, Root: last.Root}
		if err := receiptlog.CheckGrowth(was, *h, g.Path); err != nil {
			return fmt.Errorf("%w: %w", ErrGrowth, err)
		}
	}
	if next.Heads == nil {
		next.Heads = map[string]Log{}
	}
	next.Heads[h.Network] = is
	if _, known := next.Networks[h.Network]; !known {
		next.Networks[h.Network] = 0
	}
	return c.write(next)
}

// receipt counts one receipt for a chain.
func (c *Counters) receipt(chain uint64) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, known := c.receipts[chain]
	if !known {
		if err := c.admit(chain); err != nil {
			return 0, err
		}
	}
	if n == 1<<32-1 {
		return 0, fmt.Errorf("%w: too many receipts since the start; restart the signer", ErrCounters)
	}
	c.receipts[chain] = n + 1
	return c.now.Starts<<32 | uint64(n+1), nil
}

// admit writes a chain down at its first use.
func (c *Counters) admit(chain uint64) error {
	if c.allowed != nil && !slices.Contains(slices.Collect(maps.Values(c.allowed)), chain) {
		return fmt.Errorf("%w: chain %d", ErrTerms, chain)
	}
	if slices.Contains(c.now.Chains, chain) {
		return nil
	}
	if len(c.now.Chains) >= maxChains {
		return fmt.Errorf("%w: chain %d would be one more than %d", ErrTerms, chain, maxChains)
	}
	next := c.now.clone()
	next.Chains = append(next.Chains, chain)
	return c.write(next)
}

// Takeover has all counts go on where no other holder of the key can be by
// itself. For whoever has moved or restored the key and knows that no other
// machine uses it.
func (c *Counters) Takeover() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	next := c.now.Takeover()
	if err := c.write(next); err != nil {
		return err
	}
	c.receipts = map[uint64]uint32{}
	return nil
}

// Takeover returns the counts that [Counters.Takeover] goes on with.
func (v Counts) Takeover() Counts {
	v = v.clone()
	for name, n := range v.Networks {
		v.Networks[name] = (n/epoch + 1) * epoch
	}
	v.Starts = max(v.Starts+1, uint64(time.Now().Unix()))
	return v
}

// Above returns counts that are below neither of two.
func (v Counts) Above(other Counts) Counts {
	v = v.clone()
	v.Starts = max(v.Starts, other.Starts)
	for name, n := range other.Networks {
		v.Networks[name] = max(v.Networks[name], n)
	}
	for name, l := range other.Heads {
		if v.Heads == nil {
			v.Heads = map[string]Log{}
		}
		if l.Behind(v.Heads[name]) {
			v.Heads[name] = l
		}
	}
	for _, id := range other.Chains {
		if !slices.Contains(v.Chains, id) {
			v.Chains = append(v.Chains, id)
		}
	}
	return v
}

// ReadCounts reads a file of counters that nobody uses. Counts that were not
// written yet have no node.
func ReadCounts(name string) (Counts, error) {
	raw, err := durable.ReadOwn(name, 2*slotSize+1)
	if err != nil && !errors.Is(err, durable.ErrLarge) { // whose length says it, too
		return Counts{}, err
	}
	c := &Counters{now: Counts{Networks: map[string]uint64{}}}
	if err := c.parse(raw); err != nil {
		return Counts{}, fmt.Errorf("%s: %w", name, err)
	}
	return c.now, nil
}

// FormatCounts makes the content of a file of counters that nobody uses.
func FormatCounts(v Counts) ([]byte, error) {
	slot, err := formatSlot(1, v)
	return append(make([]byte, slotSize), slot...), err
}

// Starts is how many times the signer has been started, this one included.
func (c *Counters) Starts() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now.Starts
}

// Close gives the file back.
func (c *Counters) Close() error {
	if c.file == nil {
		return nil
	}
	return c.file.Close()
}
