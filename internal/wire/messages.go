package wire

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/resultity/node/internal/determinism"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
)

// Type names a message.
type Type string

// Message is the data of one frame: one of the exported structs below.
type Message interface {
	Type() Type
	// direction says who may send it.
	direction() Direction
}

// Code says why a job was refused or failed, or what an order met. Codes are
// part of the protocol; texts beside them are for people.
type Code string

// The codes. One that is retryable moves the job to another node. The others say
// that no node could do better, which the network believes only when a second
// node says the same, or there is no second one: it has checked the request
// before, so the node may be at fault. No client gets to read the text beside
// a code.
const (
	CodeBadRequest   Code = "bad_request"     // the request is not valid; no node will take it
	CodeContext      Code = "context_length"  // the prompt, with the tokens that are asked for, is longer than the model's context
	CodeUnknownModel Code = "unknown_model"   // not the active model of this node
	CodeLimit        Code = "limit"           // over a limit of the snapshot
	CodeDeadline     Code = "deadline"        // past its deadline, or it cannot be met
	CodeDuplicate    Code = "duplicate"       // this node has the job already
	CodeBusy         Code = "busy"            // no free slot
	CodeDraining     Code = "draining"        // takes no new jobs
	CodeNotReady     Code = "not_ready"       // no active deployment
	CodeConfig       Code = "config_mismatch" // accepted under another configuration
	CodeEngine       Code = "engine_failed"   // the engine ended, hung, or answered with an error
	CodeOutput       Code = "engine_output"   // the engine's output is not what its API promises
	CodeCancelled    Code = "cancelled"       // the network asked for it
	CodeStorage      Code = "storage"         // could not be written down
	CodeInternal     Code = "internal"        // see the node's journal
)

// Retryable reports whether another node may do better.
func (c Code) Retryable() bool {
	switch c {
	case CodeBadRequest, CodeContext, CodeLimit, CodeDeadline, CodeCancelled:
		return false
	}
	return true
}

// Kind is the API a job's request belongs to.
type Kind string

// The kinds of job.
const (
	KindChat       Kind = "chat"       // POST /v1/chat/completions
	KindCompletion Kind = "completion" // POST /v1/completions
)

// Registration is the body of a registration request, signed by the node.
type Registration struct {
	Network string      `json:"network"`
	Node    evm.Address `json:"node"`
	Token   string      `json:"token"` // enrolment token, opaque to the node
	Time    int64       `json:"time"`  // Unix milliseconds
	Agent   string      `json:"agent"` // version of the agent
}

// Registered is the reply, signed by a message key of the network.
type Registered struct {
	Network string      `json:"network"`
	Node    evm.Address `json:"node"`
	Account string      `json:"account"`          // "" for none
	Method  Method      `json:"method,omitempty"` // how it was bound to the account
	Since   int64       `json:"since,omitempty"`  // Unix milliseconds of the binding
	Time    int64       `json:"time"`             // Unix milliseconds of the first registration
}

// Hello is the node's first frame.
type Hello struct {
	Agent  string        `json:"agent"`
	Config digest.Digest `json:"config"` // digest of the verified snapshot, or ""
	Count  uint64        `json:"count"`  // rises with each hello of the node to the network
}

// CloseCloned is the status with which a network ends the session of a node whose
// [Hello.Count] has not risen.
const CloseCloned = 4001

// Welcome is the network's first frame.
type Welcome struct {
	Session string `json:"session"`
	Server  string `json:"server"` // version of the network service
}

// Heartbeat is the node's state, sent at the interval of the snapshot and at
// every change that matters to dispatch.
type Heartbeat struct {
	Config   digest.Digest `json:"config"`
	Models   []ModelState  `json:"models"`
	Runtime  RuntimeState  `json:"runtime"`
	Hardware Hardware      `json:"hardware"`
	Slots    int           `json:"slots"` // jobs it can run at once
	Busy     int           `json:"busy"`  // of these, those that cannot take another one now: with jobs, also of another network
	Outbox   int           `json:"outbox"`
	Draining bool          `json:"draining"`
	Failed   *Failed       `json:"failed,omitempty"` // the newest configuration, where the node has gone back from it
	Class    *Class        `json:"class,omitempty"`  // of the active runtime; absent for none

	// Head is that of the node's receipt log, at the end of what the network has
	// of it or was sent in this session; absent before the first receipt, and
	// before the network has said what it has.
	Head *receiptlog.SignedHead `json:"head,omitempty"`
}

// Class is the determinism class of a node's runtime (package determinism says what
// that is, and how its digest is made).
type Class struct {
	Digest   digest.Digest        `json:"digest"`
	Hardware determinism.Hardware `json:"hardware"` // what of the class is the machine's

	// Fingerprint is that of the answers to the configuration's golden requests, in
	// the last validation during which the engine had nothing else to do; absent
	// before there was one.
	Fingerprint digest.Digest `json:"fingerprint,omitzero"`
}

// Failed says why a node is not on a configuration that it has.
type Failed struct {
	Config digest.Digest `json:"config"`
	Step   string        `json:"step"`   // that failed: machine, image, model, unit, start, sandbox, validation
	Reason string        `json:"reason"` // for people
	Final  bool          `json:"final"`  // not tried again
}

// ModelState is one model of a heartbeat.
type ModelState struct {
	Name    string        `json:"name"`
	Version string        `json:"version"`
	Digest  digest.Digest `json:"digest"`
	State   string        `json:"state"` // pending, active, inactive, failed, archived
}

// RuntimeStandby is the state of a runtime that serves another network, in which
// the same node is by its operator's wish. The node offers no slots then, and is
// given no jobs; the network does not hear whom it serves.
const RuntimeStandby = "standby"

// RuntimeState is the runtime of a heartbeat.
type RuntimeState struct {
	State    string        `json:"state"` // stopped, starting, validating, active, failed, standby
	Engine   string        `json:"engine"`
	Image    digest.Digest `json:"image"`
	Restarts int           `json:"restarts"`
}

// Hardware is what a node says about its machine: claims, not proofs.
type Hardware struct {
	Arch    string   `json:"arch"`
	CPUs    int      `json:"cpus"`
	Memory  int64    `json:"memory"` // bytes
	Disk    int64    `json:"disk"`   // bytes free in the model store
	GPUs    []string `json:"gpus"`   // CDI names
	OS      string   `json:"os"`
	Kernel  string   `json:"kernel"`
	Podman  string   `json:"podman"`
	Systemd string   `json:"systemd"`
}

// Status is the network's own word about the node, sent after each heartbeat
// that changed it.
type Status struct {
	Routable bool   `json:"routable"`
	Reason   string `json:"reason"` // why not, for people
}

// Job is one piece of work. Request is the client's HTTP body, byte for byte.
type Job struct {
	ID       receipt.JobID `json:"id"`
	Model    string        `json:"model"`
	Kind     Kind          `json:"kind"`
	Stream   bool          `json:"stream"` // the response is an event stream
	Request  []byte        `json:"request"`
	Seed     uint32        `json:"seed"`     // used where the request names none, so that the job can be repeated
	Created  int64         `json:"created"`  // Unix seconds, repeated in the response
	Deadline int64         `json:"deadline"` // Unix milliseconds
	Config   digest.Digest `json:"config"`   // the snapshot it is dispatched under
}

// Accept says that the job is written down and will end in a result.
type Accept struct {
	Job receipt.JobID `json:"job"`
}

// Refuse says that the job was not taken and leaves no trace on the node.
type Refuse struct {
	Job     receipt.JobID `json:"job"`
	Code    Code          `json:"code"`
	Message string        `json:"message"`
}

// Chunk is a part of a streamed response as soon as it is there.
type Chunk struct {
	Job    receipt.JobID `json:"job"`
	Offset int64         `json:"offset"` // of Data in the response body
	Data   []byte        `json:"data"`
}

// Result ends an accepted job. It is kept by the node and sent again until
// the network acknowledges it.
type Result struct {
	Job      receipt.JobID   `json:"job"`
	Code     Code            `json:"code,omitempty"` // why it failed; then nothing below Message is set
	Message  string          `json:"message,omitempty"`
	Response []byte          `json:"response,omitempty"` // the whole HTTP response body
	Receipt  *receipt.Signed `json:"receipt,omitempty"`
}

// Ack says that the network has stored these jobs' results (or needs none):
// the node may forget them.
type Ack struct {
	Jobs []receipt.JobID `json:"jobs"`
}

// Cancel asks to stop working on a job; the node answers with a result.
type Cancel struct {
	Job    receipt.JobID `json:"job"`
	Reason string        `json:"reason"`
}

// Update says that a new configuration has been published.
type Update struct {
	Version int64 `json:"version"` // of the targets metadata
}

// Bye announces an orderly end of the session.
type Bye struct {
	Reason string `json:"reason"`
}

// Type and direction of each message.

func (*Hello) Type() Type      { return "hello" }
func (*Welcome) Type() Type    { return "welcome" }
func (*Heartbeat) Type() Type  { return "heartbeat" }
func (*Status) Type() Type     { return "status" }
func (*Job) Type() Type        { return "job" }
func (*Accept) Type() Type     { return "accept" }
func (*Refuse) Type() Type     { return "refuse" }
func (*Chunk) Type() Type      { return "chunk" }
func (*Result) Type() Type     { return "result" }
func (*Ack) Type() Type        { return "ack" }
func (*Cancel) Type() Type     { return "cancel" }
func (*Update) Type() Type     { return "update" }
func (*Bye) Type() Type        { return "bye" }
func (*Order) Type() Type      { return "order" }
func (*OrderDone) Type() Type  { return "orderdone" }
func (*OrderAck) Type() Type   { return "orderack" }
func (*Logs) Type() Type       { return "logs" }
func (*LogsAck) Type() Type    { return "logsack" }
func (*Leaves) Type() Type     { return "leaves" }
func (*LeavesAck) Type() Type  { return "leavesack" }
func (*Sandbox) Type() Type    { return "sandbox" }
func (*SandboxAck) Type() Type { return "sandboxack" }

func (*Hello) direction() Direction      { return ToNetwork }
func (*Welcome) direction() Direction    { return ToNode }
func (*Heartbeat) direction() Direction  { return ToNetwork }
func (*Status) direction() Direction     { return ToNode }
func (*Job) direction() Direction        { return ToNode }
func (*Accept) direction() Direction     { return ToNetwork }
func (*Refuse) direction() Direction     { return ToNetwork }
func (*Chunk) direction() Direction      { return ToNetwork }
func (*Result) direction() Direction     { return ToNetwork }
func (*Ack) direction() Direction        { return ToNode }
func (*Cancel) direction() Direction     { return ToNode }
func (*Update) direction() Direction     { return ToNode }
func (*Bye) direction() Direction        { return ToNetwork }
func (*Order) direction() Direction      { return ToNode }
func (*OrderDone) direction() Direction  { return ToNetwork }
func (*OrderAck) direction() Direction   { return ToNode }
func (*Logs) direction() Direction       { return ToNetwork }
func (*LogsAck) direction() Direction    { return ToNode }
func (*Leaves) direction() Direction     { return ToNetwork }
func (*LeavesAck) direction() Direction  { return ToNode }
func (*Sandbox) direction() Direction    { return ToNetwork }
func (*SandboxAck) direction() Direction { return ToNode }

// messages makes an empty value of each type; the one list of them.
var messages = func() map[Type]func() Message {
	m := map[Type]func() Message{}
	for _, f := range []func() Message{
		func() Message { return new(Hello) }, func() Message { return new(Welcome) }, func() Message { return new(Heartbeat) },
		func() Message { return new(Status) }, func() Message { return new(Job) }, func() Message { return new(Accept) },
		func() Message { return new(Refuse) }, func() Message { return new(Chunk) }, func() Message { return new(Result) },
		func() Message { return new(Ack) }, func() Message { return new(Cancel) }, func() Message { return new(Update) },
		func() Message { return new(Bye) }, func() Message { return new(Order) }, func() Message { return new(OrderDone) },
		func() Message { return new(OrderAck) }, func() Message { return new(Logs) }, func() Message { return new(LogsAck) },
		func() Message { return new(Bound) }, func() Message { return new(Leaves) }, func() Message { return new(LeavesAck) },
		func() Message { return new(Sandbox) }, func() Message { return new(SandboxAck) },
	} {
		m[f().Type()] = f
	}
	return m
}()

// Messages returns an empty message of each type that goes in a direction, by name.
func Messages(d Direction) (list []Message) {
	for _, t := range slices.Sorted(maps.Keys(messages)) {
		if m := messages[t](); m.direction() == d {
			list = append(list, m)
		}
	}
	return list
}

func decode(typ []byte, d Direction, data []byte) (Message, error) {
	f, ok := messages[Type(typ)]
	if !ok {
		return nil, fmt.Errorf("%w: unknown type %.40q", ErrMalformed, typ)
	}
	m := f()
	if m.direction() != d {
		return nil, fmt.Errorf("%w: %s goes the other way", ErrMalformed, typ)
	}
	if err := read(data, m); err != nil {
		return nil, fmt.Errorf("%s: %w", typ, malformed(err))
	}
	bound(m)
	return m, nil
}

// read parses a message and looks at its bounds. Its errors need not say whose
// fault they are: it is that of who sent data, which decode says of all of them.
func read(data []byte, m Message) error {
	var err error
	switch m := m.(type) {
	case *Chunk:
		err = m.parse(data)
	case *Result:
		err = m.ParseJSON(data)
	default:
		err = parse(data, m)
	}
	if c, ok := m.(checker); ok && err == nil {
		err = c.check()
	}
	return err
}

// checker has values that are wrong in themselves, whoever the sender is.
type checker interface{ check() error }

func (m *Job) check() error    { return named(m.ID) }
func (m *Accept) check() error { return named(m.Job) }
func (m *Refuse) check() error { return named(m.Job) }
func (m *Cancel) check() error { return named(m.Job) }
func (m *Ack) check() error    { return named(m.Jobs...) }

// named refuses an id that is missing: it is the one of no job.
func named(ids ...receipt.JobID) error {
	if slices.Contains(ids, receipt.JobID{}) {
		return errors.New("no job is named")
	}
	return nil
}

func (r *Result) check() error {
	switch {
	case r.Code != "" && (len(r.Response) > 0 || r.Receipt != nil):
		return fmt.Errorf("it has code %.40q, and a response or a receipt", r.Code)
	case r.Code == "" && r.Message != "":
		return errors.New("it has a message and no code")
	}
	return nil
}

// Bounds of a heartbeat.
const (
	maxListed = 256     // models, and GPUs
	maxSlots  = 1 << 16 // and busy ones
)

func (m *Heartbeat) check() error {
	switch {
	case len(m.Models) > maxListed || len(m.Hardware.GPUs) > maxListed:
		return fmt.Errorf("%d models and %d GPUs, at most %d each", len(m.Models), len(m.Hardware.GPUs), maxListed)
	case m.Slots < 0 || m.Slots > maxSlots || m.Busy < 0 || m.Busy > maxSlots:
		return fmt.Errorf("%d slots, %d busy", m.Slots, m.Busy)
	}
	if m.Class != nil {
		if m.Class.Digest.IsZero() {
			return errors.New("a class without a digest")
		}
		if err := m.Class.Hardware.Check(); err != nil {
			return fmt.Errorf("class: %w", err)
		}
	}
	return boundHead(m.Head)
}

// MaxText bounds the texts for people in what a peer sends, in bytes.
const MaxText = 512

// texter has texts for people. They end in logs, in status and on terminals, so
// they are cut to one printable line where they enter, and whoever uses them
// need not think of it. Orders and logs have stricter rules of their own.
type texter interface{ texts() []*string }

func bound(v any) {
	t, ok := v.(texter)
	if !ok {
		return
	}
	for _, s := range t.texts() {
		*s = Cut(*s, MaxText)
	}
}

func (m *Hello) texts() []*string      { return []*string{&m.Agent} }
func (m *Welcome) texts() []*string    { return []*string{&m.Session, &m.Server} }
func (m *Status) texts() []*string     { return []*string{&m.Reason} }
func (m *Refuse) texts() []*string     { return []*string{(*string)(&m.Code), &m.Message} }
func (m *Result) texts() []*string     { return []*string{(*string)(&m.Code), &m.Message} }
func (m *Cancel) texts() []*string     { return []*string{&m.Reason} }
func (m *Bye) texts() []*string        { return []*string{&m.Reason} }
func (m *Bound) texts() []*string      { return []*string{&m.Account, (*string)(&m.Method)} }
func (m *LogsAck) texts() []*string    { return []*string{&m.Spool} }
func (m *BindReply) texts() []*string  { return []*string{&m.Network, &m.Bound.Account} }
func (m *Registered) texts() []*string { return []*string{&m.Network, &m.Account} }

func (m *Heartbeat) texts() []*string {
	h := &m.Hardware
	list := []*string{&m.Runtime.State, &m.Runtime.Engine, &h.Arch, &h.OS, &h.Kernel, &h.Podman, &h.Systemd}
	for i := range h.GPUs {
		list = append(list, &h.GPUs[i])
	}
	for i := range m.Models {
		list = append(list, &m.Models[i].Name, &m.Models[i].Version, &m.Models[i].State)
	}
	if m.Failed != nil {
		list = append(list, &m.Failed.Step, &m.Failed.Reason)
	}
	return list
}
