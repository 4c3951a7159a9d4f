package wire

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"regexp"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
)

// LogRecord is one record of a node's log as it may leave the node. Message is a
// constant text of the agent's; what differs from record to record is in Fields.
type LogRecord struct {
	Position uint64            `json:"n"`
	Time     int64             `json:"time"` // Unix milliseconds
	Level    string            `json:"level"`
	Event    string            `json:"event,omitempty"` // name of the journal's catalog
	Message  string            `json:"message"`
	Fields   map[string]string `json:"fields,omitempty"`
}

// logFields are the fields that may leave a node, and the bytes they may have.
// Text of a request or a response has no field. error and reason can name paths
// and hosts of the node; they are cut short, and a record about a job has neither:
// an engine could have put there what it was asked.
var logFields = map[string]int{
	"job": 40, "model": 128, "image": 400, "digest": 80, "version": 64, "code": 32, "step": 16, "took": 32,
	"prompt_tokens": 20, "completion_tokens": 20, "results": 20, "count": 20, "status": 64, "type": 32,
	"order": 32, "kind": 32, "outcome": 16, "until": 40, "unit": 64, "result": 64, "was": 64, "account": 128, "node": 42,
	"network": 64, "error": 300, "reason": 300,
}

// LogField returns a field as it may leave a node; false for one that may not.
func LogField(name, value string) (string, bool) {
	limit, ok := logFields[name]
	return Cut(value, limit), ok
}

// Seal takes from a record what may not leave a node beside what is in it.
func (r *LogRecord) Seal() {
	if r.Fields["job"] != "" {
		delete(r.Fields, "error")
		delete(r.Fields, "reason")
	}
}

// Bounds of logs.
const (
	MaxLogBatch    = 256 << 10 // bytes, compressed
	MaxLogInflated = 4 << 20   // bytes
	MaxLogRecord   = 8 << 10   // bytes of a record's JSON and its line's end
	maxLogMessage  = 200       // bytes
)

var (
	eventPattern = regexp.MustCompile(`^[a-z0-9-]{0,64}$`)
	levelPattern = regexp.MustCompile(`^(INFO|WARN|ERROR)([+-][0-9])?$`)
)

// ErrLogs says that a batch of logs holds what may not be in one.
var ErrLogs = errors.New("logs out of bounds")

// Check refuses a record that may not leave a node.
func (r *LogRecord) Check() error {
	switch {
	case !levelPattern.MatchString(r.Level):
		return fmt.Errorf("%w: level %.20q", ErrLogs, r.Level)
	case !eventPattern.MatchString(r.Event):
		return fmt.Errorf("%w: event %.80q", ErrLogs, r.Event)
	case len(r.Message) > maxLogMessage || Printable(r.Message) != r.Message:
		return fmt.Errorf("%w: message of %d bytes", ErrLogs, len(r.Message))
	}
	for name, value := range r.Fields {
		if kept, ok := LogField(name, value); !ok || kept != value {
			return fmt.Errorf("%w: field %.40q of %d bytes", ErrLogs, name, len(value))
		}
	}
	if r.Fields["job"] != "" && (r.Fields["error"] != "" || r.Fields["reason"] != "") {
		return fmt.Errorf("%w: a record about a job has error or reason", ErrLogs)
	}
	return nil
}

// CutMessage makes a message that passes [LogRecord.Check].
func CutMessage(s string) string { return Cut(s, maxLogMessage) }

// LogBatch is what a batch of logs says about itself. The records that the node
// has written after After and up to Last are in it, but for those that were
// dropped, since the node keeps a bounded number: Last - After - Count of them.
type LogBatch struct {
	Network string        `json:"network"`
	Node    evm.Address   `json:"node"`
	Spool   string        `json:"spool"` // positions count from the beginning of this spool; 32 hexadecimal digits
	After   uint64        `json:"after"`
	Last    uint64        `json:"last"`
	Count   uint64        `json:"count"`
	Digest  digest.Digest `json:"digest"` // of Logs.Data
}

// Dropped is how many records of the batch's span are lost.
func (b *LogBatch) Dropped() uint64 { return b.Last - b.After - b.Count }

// Logs is a batch of a node's logs. The body is a [LogBatch], signed by the node
// over keccak("resultity.v1 logs\n" ‖ body). Data is gzip of lines, each the JSON
// of a [LogRecord].
type Logs struct {
	statement
	Data []byte `json:"data"`
}

// LogsAck says up to which position the network has stored a spool's records.
type LogsAck struct {
	Spool    string `json:"spool"`
	Position uint64 `json:"position"`
}

// SealLogs signs a batch over records that a [Packer] has packed.
func SealLogs(key signer, b LogBatch, data []byte) (*Logs, error) {
	b.Digest = digest.Of(data)
	body, sig, err := SignLogs(key, &b)
	if err != nil {
		return nil, err
	}
	return NewLogs(body, sig, data), nil
}

// SignLogs signs a batch without its data.
func SignLogs(key signer, b *LogBatch) (body []byte, sig evm.Signature, err error) {
	s, err := makeStatement(key, logsDomain, b)
	return s.Body, s.Signature, err
}

// NewLogs puts together what [SignLogs] has signed and its data.
func NewLogs(body []byte, sig evm.Signature, data []byte) *Logs {
	return &Logs{statement{body, sig}, data}
}

var spoolPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)

// Open checks the signature and the form of a batch, without looking into its
// data. The caller compares signer, node and network with whom it talks to.
func (l *Logs) Open() (*LogBatch, evm.Address, error) {
	b := new(LogBatch)
	who, err := l.open(logsDomain, b)
	switch {
	case err != nil:
		return nil, who, err
	case len(l.Data) > MaxLogBatch:
		return nil, who, fmt.Errorf("%w: %d bytes, at most %d", ErrLogs, len(l.Data), MaxLogBatch)
	case !spoolPattern.MatchString(b.Spool):
		return nil, who, fmt.Errorf("%w: spool %.40q", ErrLogs, b.Spool)
	case b.Last <= b.After || b.Count == 0 || b.Count > b.Last-b.After || b.Last > 1<<53:
		return nil, who, fmt.Errorf("%w: %d records after %d up to %d", ErrLogs, b.Count, b.After, b.Last)
	case b.Digest != digest.Of(l.Data):
		return nil, who, fmt.Errorf("%w: the data are not those that were signed", ErrLogs)
	}
	return b, who, nil
}

// Packer makes the data of one batch within bounds.
type Packer struct {
	limit    int // bytes, compressed
	buf      bytes.Buffer
	zip      *gzip.Writer
	inflated int
	pending  int // bytes that may still be in the compressor
}

// NewPacker begins a batch of at most limit bytes, [MaxLogBatch] at most.
func NewPacker(limit int) *Packer {
	p := &Packer{limit: min(limit, MaxLogBatch)}
	p.zip = gzip.NewWriter(&p.buf)
	return p
}

// Add takes the JSON of one record, without a line's end; false when the batch
// is full.
func (p *Packer) Add(line []byte) bool {
	size := len(line) + 1
	// What the compressor holds may turn out not to compress at all.
	if p.buf.Len()+p.pending+size+512 > p.limit || p.inflated+size > MaxLogInflated {
		return false
	}
	_, _ = p.zip.Write(append(line[:len(line):len(line)], '\n')) // a buffer takes everything
	p.inflated += size
	if p.pending += size; p.pending >= 16<<10 {
		_ = p.zip.Flush() // likewise
		p.pending = 0
	}
	return true
}

// Data ends the batch.
func (p *Packer) Data() []byte {
	_ = p.zip.Close() // a buffer takes everything
	return p.buf.Bytes()
}

// Unpack inflates the data of an opened batch, within bounds, and returns its
// records, each of which may leave a node. Their number and positions are those
// that the batch says.
func (b *LogBatch) Unpack(data []byte) ([]LogRecord, error) {
	zip, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLogs, err)
	}
	limited := &io.LimitedReader{R: zip, N: MaxLogInflated + 1}
	lines := bufio.NewScanner(limited)
	lines.Buffer(make([]byte, 0, 4096), MaxLogRecord)
	var records []LogRecord
	at := b.After
	for lines.Scan() && limited.N > 0 {
		var r LogRecord
		if err := strict(lines.Bytes(), &r); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrLogs, err)
		}
		if err := r.Check(); err != nil {
			return nil, err
		}
		if r.Position <= at || r.Position > b.Last || uint64(len(records)) == b.Count {
			return nil, fmt.Errorf("%w: record %d after %d, of %d up to %d", ErrLogs, r.Position, at, b.Count, b.Last)
		}
		at = r.Position
		records = append(records, r)
	}
	switch {
	case limited.N <= 0:
		return nil, fmt.Errorf("%w: inflates to more than %d bytes", ErrLogs, MaxLogInflated)
	case lines.Err() != nil:
		return nil, fmt.Errorf("%w: %w", ErrLogs, lines.Err())
	case uint64(len(records)) != b.Count || at != b.Last:
		return nil, fmt.Errorf("%w: %d records up to %d, not %d up to %d", ErrLogs, len(records), at, b.Count, b.Last)
	}
	return records, nil
}
