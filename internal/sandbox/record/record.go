// Package record owns the signed record of the runtime's sandbox: what the
// bridge found inside the container and the agent outside of it, its exact bytes,
// its digest and its signature.
//
// The rule it keeps: there is one spelling of a record, and none of a sandbox that
// was not found sealed. Receipts name a record by the SHA-256 of its bytes.
package record

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
)

// Version is that of the records. Others are refused.
const Version = 1

// MaxSize bounds a record, in bytes. Most of one are its mounts, of which a
// graphics card brings a hundred along.
const MaxSize = 48 << 10

// ErrInvalid says that something is no record, or not the node's that it names.
var ErrInvalid = errors.New("invalid sandbox record")

// Outside is what the agent sees of the container's first process. The bridge's
// word is worth less where the engine has taken the container over.
type Outside struct {
	UIDs         []int             `json:"uids"`         // real, effective, saved and file system user, in the agent's user namespace
	Capabilities []string          `json:"capabilities"` // names of the sets that are not empty
	NoNewPrivs   bool              `json:"noNewPrivs"`
	Seccomp      int               `json:"seccomp"` // 2: filtered
	Interfaces   []string          `json:"interfaces"`
	Routes       []string          `json:"routes"`     // interfaces other than lo that something is routed over
	Namespaces   map[string]string `json:"namespaces"` // as far as the agent may see them
	Cgroup       string            `json:"cgroup"`     // path in the unified hierarchy
	Memory       int64             `json:"memory"`     // ceiling in bytes, 0 for none
}

// Views are both looks at the container at one time.
type Views struct {
	Inside  contract.Sandbox `json:"inside"`
	Outside Outside          `json:"outside"`
}

// Record is a look at the sandbox in which a node works for a network.
type Record struct {
	Version int           `json:"version"`
	Node    evm.Address   `json:"node"`
	Network string        `json:"network"`
	Time    int64         `json:"time"`  // of the look, Unix milliseconds of the node's clock
	Start   string        `json:"start"` // which start of the runtime: systemd's invocation id
	Config  digest.Digest `json:"config"`
	Image   digest.Digest `json:"image"` // manifest
	Views
}

var (
	networkPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)
	startPattern   = regexp.MustCompile(`^[0-9a-f]{32}$`)
)

func (r *Record) check() error {
	switch in := &r.Inside; {
	case r.Version != Version:
		return fmt.Errorf("version %d, want %d", r.Version, Version)
	case r.Node == evm.Address{}:
		return errors.New("it names no node")
	case !networkPattern.MatchString(r.Network):
		return fmt.Errorf("network %.80q", r.Network)
	case r.Time <= 0:
		return fmt.Errorf("time %d", r.Time)
	case !startPattern.MatchString(r.Start):
		return fmt.Errorf("start %.80q, want 32 hexadecimal digits", r.Start)
	case r.Config.IsZero(), r.Image.IsZero():
		return errors.New("it names no configuration, or no image")
	case in.Version != contract.Version:
		return fmt.Errorf("the inside view is of version %d, want %d", in.Version, contract.Version)
	case !in.OK, len(in.Checks) == 0, slices.ContainsFunc(in.Checks, func(c contract.Check) bool { return !c.OK }):
		return errors.New("it is of a sandbox that is not sealed")
	}
	return nil
}

// Encode returns the one spelling.
func (r *Record) Encode() ([]byte, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	// What is no text in a path is replaced, and spelt otherwise when it was read.
	var again Record
	if err := json.Unmarshal(b, &again); err != nil {
		return nil, err
	}
	if b, err = json.Marshal(&again); err != nil {
		return nil, err
	}
	_, err = Parse(b)
	return b, err
}

// Parse reads the one spelling. Errors wrap [ErrInvalid].
func Parse(b []byte) (*Record, error) {
	r, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return r, nil
}

func parse(b []byte) (*Record, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("%d bytes, at most %d", len(b), MaxSize)
	}
	var r Record
	if err := strict(b, &r); err != nil {
		return nil, err
	}
	again, err := json.Marshal(&r)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, b) {
		return nil, errors.New("it is spelt in another way")
	}
	return &r, r.check()
}

// strict decodes exactly one JSON value without unknown fields.
func strict(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return errors.New("something follows it")
	}
	return nil
}

// Hash is what a node signs of a record's bytes.
func Hash(body []byte) evm.Hash { return evm.Keccak([]byte("resultity.v1 sandbox\n"), body) }

// Signed is a record whose signature was checked, or made by this node. Only
// [Record.Sign], [With] and [Open] make one. As JSON it is
//
//	{"record": …, "signature": "0x…"}
//
// with the record's bytes as they are. White space between them means nothing.
type Signed struct {
	record Record
	body   []byte
	sig    evm.Signature
}

// Sign makes the signed form. The key must be r.Node's.
func (r *Record) Sign(key *evm.Key) (*Signed, error) {
	if key.Address() != r.Node {
		return nil, fmt.Errorf("sandbox record of %s cannot be signed by %s", r.Node, key.Address())
	}
	body, err := r.Encode()
	if err != nil {
		return nil, err
	}
	sig, err := key.Sign(Hash(body))
	if err != nil {
		return nil, err
	}
	return With(body, sig)
}

// With makes the signed form of a signature that the node's signer has made.
func With(body []byte, sig evm.Signature) (*Signed, error) {
	r, err := Parse(body)
	if err != nil {
		return nil, err
	}
	return &Signed{record: *r, body: body, sig: sig}, nil
}

// Record returns what was signed. The caller must not change what it refers to.
func (s *Signed) Record() *Record { return &s.record }

// Digest names the record in receipts.
func (s *Signed) Digest() digest.Digest { return digest.Of(s.body) }

// Signature returns the signature over [Hash].
func (s *Signed) Signature() evm.Signature { return s.sig }

type signedJSON struct {
	Record    json.RawMessage `json:"record"`
	Signature evm.Signature   `json:"signature"`
}

// MarshalJSON implements [json.Marshaler].
func (s *Signed) MarshalJSON() ([]byte, error) { return json.Marshal(signedJSON{s.body, s.sig}) }

// UnmarshalJSON implements [json.Unmarshaler]; it is [Open].
func (s *Signed) UnmarshalJSON(b []byte) error {
	v, err := Open(b)
	if err != nil {
		return err
	}
	*s = *v
	return nil
}

// MaxSigned bounds the JSON form in bytes, with room for white space.
const MaxSigned = 4 * MaxSize

// Open reads the JSON form, and checks that the node which the record names has
// signed it. Errors wrap [ErrInvalid].
func Open(b []byte) (*Signed, error) {
	if len(b) > MaxSigned {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrInvalid, len(b), MaxSigned)
	}
	var j signedJSON
	if err := strict(b, &j); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	var body bytes.Buffer
	if err := json.Compact(&body, j.Record); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	s, err := With(body.Bytes(), j.Signature)
	if err != nil {
		return nil, err
	}
	switch by, err := evm.Recover(Hash(s.body), s.sig); {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	case by != s.record.Node:
		return nil, fmt.Errorf("%w: signed by %s, not by node %s; something in it may have been changed", ErrInvalid, by, s.record.Node)
	}
	return s, nil
}

// Drift lists what has changed between two looks at one start of the runtime, ""
// for nothing. Interfaces that lead nowhere are left out: the kernel adds them when
// somebody loads a module on the host. So is the ceiling of its memory, which a slice
// above may lower.
func Drift(was, is *Views) (list []string) {
	compare := func(view string, a, b any, names []string) {
		x, y := reflect.ValueOf(a), reflect.ValueOf(b)
		for i := range x.NumField() {
			f := x.Type().Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if slices.Contains(names, name) {
				continue
			}
			if p, q := spell(x.Field(i).Interface()), spell(y.Field(i).Interface()); p != q {
				list = append(list, fmt.Sprintf("%s: %s was %.300s and is %.300s", view, name, p, q))
			}
		}
	}
	compare("inside", was.Inside, is.Inside, []string{"interfaces"})
	compare("outside", was.Outside, is.Outside, []string{"interfaces", "memory"})
	if p, q := spell(leading(was)), spell(leading(is)); p != q {
		list = append(list, fmt.Sprintf("inside: interfaces were %.300s and are %.300s", p, q))
	}
	return list
}

// leading are the interfaces that could lead somewhere.
func leading(v *Views) []contract.Interface {
	return slices.DeleteFunc(slices.Clone(v.Inside.Interfaces), func(i contract.Interface) bool {
		return !i.Loopback && !i.Up && len(i.Addresses) == 0
	})
}

// spell prints a value so that equal ones look alike: an empty list is none.
func spell(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // strings, numbers and lists of them
	}
	if s := string(b); s != "[]" && s != "{}" {
		return s
	}
	return "null"
}
