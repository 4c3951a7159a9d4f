package store

import (
	"encoding/binary"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/resultity/node/internal/network/store/blocks"
)

// kind is what damage needs to be known of the records of one stream.
type kind struct {
	stream  string
	subject *regexp.Regexp
	message func([]byte) bool // says whether it can be one of this stream
	// copied streams are small and matter most: there is a second copy of them, and they
	// have one message of each subject.
	copied bool
	many   bool // there are several messages of a subject
	// closed: a record that is lost must not be taken for one that never was.
	closed bool
	// means says what the loss of a record comes to, and what there is to be done.
	means string
}

// text is what package json makes of a record. The mark of a deletion is empty.
func text(m []byte) bool { return len(m) == 0 || m[0] == '{' }

const (
	ofNode = `[0-9a-f]{40}`
	ofJob  = `[0-9a-f]{32}`
	ofHash = `[0-9a-f]{64}`
)

// kinds are in the order in which they are looked at: what is small first.
var kinds = []kind{
	{stream: "KV_NODES", subject: of(`\$KV\.NODES\.` + ofNode), message: text, copied: true, closed: true,
		means: "the registration of a node, with its account and its count of hellos. The node gets no session, and is not registered anew, since its account and what is known of its key would be forgotten. " +
			"Look at who has it (journal, receipts), then let it register anew: resultity-network damage forget. A node with an enrolment token then has its account again; any other one is bound anew by its owner"},
	{stream: "KV_ACCOUNTS", subject: of(`\$KV\.ACCOUNTS\.` + ofHash), message: text, copied: true, closed: true,
		means: "which account an e-mail address has. Nothing is bound to this address any more, since it would get another account. If that is right all the same: resultity-network damage forget. Nodes that are bound stay so"},
	{stream: "KV_APIKEYS", subject: of(`\$KV\.APIKEYS\.` + ofHash), message: text, copied: true,
		means: "an API key. It is refused from now on: make another one for whoever had it (resultity-network apikey create). Where its name cannot be read it may be a revocation: then revoke once more what was revoked"},
	{stream: "KV_TOKENS", subject: of(`\$KV\.TOKENS\.` + ofHash), message: text, copied: true,
		means: "an enrolment token. It is refused from now on, and nodes that have it stay registered: make another one if it is still needed (resultity-network token create)"},
	{stream: "KV_RECEIPTLOGS", subject: of(`\$KV\.RECEIPTLOGS\.` + ofNode + `(\.[0-9]{1,20})?`), message: text, copied: true,
		means: "the head and the edge of a node's receipt log. The node sends its log again, as far as it has it"},
	{stream: "KV_CONFIGS", subject: of(`\$KV\.CONFIGS\.` + ofHash), message: text, copied: true,
		means: "a published configuration. The one that is published now is written again at the next start; jobs under another one that are not finished are checked no more than by their receipts"},
	{stream: "KV_ORDERS", subject: of(`\$KV\.ORDERS\.` + ofNode + `\.` + ofJob), message: text, copied: true,
		means: "an order to a node. If it was not carried out it never will be: give it again"},
	{stream: "KV_OUTBOX", subject: of(`\$KV\.OUTBOX\.[A-Z2-7]{26}`), message: text,
		means: "a message with a code that no mail server had. Its owner asks for another code"},
	{stream: "JOBS", subject: of(`jobs\.` + ofJob), message: text,
		means: "a job that was not finished. If the service has it in memory it goes on; after a start its client gets no answer, and asks again"},
	{stream: "REPLAYS", subject: of(`replays\.` + ofJob), message: text, many: true,
		means: "what came of giving a job out again. Nothing rests on it"},
	{stream: "SANDBOXES", subject: of(`sandboxes\.` + ofNode + `\.` + ofHash), message: text,
		means: "the record of a node's sandbox. Receipts that name it cannot be followed to it any more, unless the node sends it again"},
	{stream: "TILES", subject: of(`tiles\.` + ofNode + `\.[0-9]{1,20}\.[0-9]{1,2}\.[0-9]{1,20}`), message: func(m []byte) bool { return len(m) == 256*32 },
		means: "a tile of a node's receipt log. It is made again of those below it, or of the leaves that the node still has; where it cannot be, receipts that need it cannot be proven any more"},
	{stream: "LOGS", subject: of(`logs\.` + ofNode), message: text, many: true,
		means: "a batch of a node's log. It is in the journal of the node"},
	{stream: "REQUESTS", subject: of(`requests\.` + ofJob), message: text,
		means: "the request of a finished job. It cannot be given out again"},
	{stream: "RESULTS", subject: of(`results\.` + ofJob), message: func(m []byte) bool {
		return len(m) > 4 && m[4] == '{' && int64(binary.BigEndian.Uint32(m)) <= int64(len(m)-4)
	}, means: "a result with its receipt. Its client has had both, and the network has them no more"},
}

func of(pattern string) *regexp.Regexp { return regexp.MustCompile(`^` + pattern + `$`) }

func kindOf(stream string) *kind {
	for i := range kinds {
		if kinds[i].stream == stream {
			return &kinds[i]
		}
	}
	return nil
}

// streamOf is the stream of a subject.
func streamOf(subject string) string {
	if key, ok := strings.CutPrefix(subject, "$KV."); ok {
		bucket, _, _ := strings.Cut(key, ".")
		return "KV_" + bucket
	}
	first, _, _ := strings.Cut(subject, ".")
	return strings.ToUpper(first)
}

// fits is [blocks.Stream.Fits].
func (k *kind) fits(subject, message []byte) bool {
	return k.subject.Match(subject) && (message == nil || k.message(message))
}

// streamsIn is where JetStream has its streams.
func streamsIn(dir string) string { return filepath.Join(dir, "jetstream", "$G", "streams") }

// files are the files of a kind's stream.
func (s *Store) files(k *kind) *blocks.Stream {
	b := &blocks.Stream{
		Name: k.stream, Dir: filepath.Join(streamsIn(s.dir), k.stream), Rescued: filepath.Join(s.dir, "rescued", k.stream),
		Meta: filepath.Join(s.dir, "copies", k.stream), Single: k.copied, Fits: k.fits,
	}
	if k.copied {
		b.Spare = filepath.Join(s.dir, "copies", k.stream)
	}
	return b
}
