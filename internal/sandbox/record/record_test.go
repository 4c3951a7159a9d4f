package record

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
)

func newKey(t testing.TB) *evm.Key {
	t.Helper()
	k, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sample(node evm.Address) *Record {
	return &Record{
		Version: Version, Node: node, Network: "testnet", Time: 1_800_000_000_000, Start: strings.Repeat("0a", 16),
		Config: digest.Of([]byte("config")), Image: digest.Of([]byte("image")),
		Views: Views{
			Inside: contract.Sandbox{
				Version: contract.Version, OK: true, UID: 1000, GID: 1000, Groups: []int{},
				Checks:     []contract.Check{{Name: "user", Want: "one that is not 0", Got: "1000", OK: true}, {Name: "root", Want: "read-only", Got: "EROFS", OK: true}},
				Namespaces: map[string]string{"net": "net:[2]", "mnt": "mnt:[3]"}, Cgroup: "/",
				Interfaces: []contract.Interface{{Name: "lo", Up: true, Loopback: true, Addresses: []string{"127.0.0.1/8"}}},
				Devices:    []contract.Device{{Path: "/dev/null", Major: 1, Minor: 3}},
				Mounts:     []contract.Mount{{Point: "/", Type: "overlay", ReadOnly: true}, {Point: "/tmp & <more>", Type: "tmpfs", Allowed: true}},
			},
			Outside: Outside{UIDs: []int{1, 1, 1, 1}, NoNewPrivs: true, Seccomp: 2, Interfaces: []string{"lo"}, Cgroup: "/runtime.service", Memory: 1 << 30},
		},
	}
}

func sign(t testing.TB, r *Record, key *evm.Key) (*Signed, []byte) {
	t.Helper()
	s, err := r.Sign(key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return s, raw
}

func TestOpen(t *testing.T) {
	key := newKey(t)
	r := sample(key.Address())
	r.Inside.Mounts[1].Point = "/no text \xff" // is replaced, and the record is still what it is
	s, raw := sign(t, r, key)
	var indented bytes.Buffer
	if err := json.Indent(&indented, raw, "", "\t"); err != nil {
		t.Fatal(err)
	}
	for _, b := range [][]byte{raw, indented.Bytes()} {
		back, err := Open(b)
		if err != nil {
			t.Fatal(err)
		}
		if back.Digest() != s.Digest() || back.Record().Config != r.Config || back.Record().Outside.Memory != 1<<30 {
			t.Errorf("%+v", back.Record())
		}
		if again, err := json.Marshal(back); err != nil || !bytes.Equal(again, raw) {
			t.Errorf("printed %s (%v), want %s", again, err, raw)
		}
	}
	// The digest is that of the bytes that are signed, as they stand in the file.
	begin := bytes.Index(raw, []byte(`{"version"`))
	end := bytes.LastIndex(raw, []byte(`,"signature"`))
	if got := digest.Of(raw[begin:end]); got != s.Digest() {
		t.Errorf("the bytes have %s, the record %s", got, s.Digest())
	}
}

// No byte can be changed.
func TestOpenRefusesEveryChange(t *testing.T) {
	key := newKey(t)
	signed, raw := sign(t, sample(key.Address()), key)
	for i := range raw {
		for _, c := range []byte{raw[i] ^ 1, raw[i] ^ ' ', '0', 'a', '"', '}'} {
			if c == raw[i] {
				continue
			}
			bad := bytes.Clone(raw)
			bad[i] = c
			// A digit of the signature may be upper case.
			if s, err := Open(bad); !errors.Is(err, ErrInvalid) && (err != nil || s.Digest() != signed.Digest()) {
				t.Fatalf("byte %d, %q to %q: %v", i, raw[i], c, err)
			}
		}
		for _, bad := range [][]byte{raw[:i], append(bytes.Clone(raw), raw[i]|1)} {
			if _, err := Open(bad); !errors.Is(err, ErrInvalid) {
				t.Fatalf("%s: %v", bad, err)
			}
		}
	}
}

func TestRefuses(t *testing.T) {
	key, other := newKey(t), newKey(t)
	for what, change := range map[string]func(*Record){
		"another version":     func(r *Record) { r.Version++ },
		"no node":             func(r *Record) { r.Node = evm.Address{} },
		"no network":          func(r *Record) { r.Network = "" },
		"an odd network":      func(r *Record) { r.Network = "../x" },
		"no time":             func(r *Record) { r.Time = 0 },
		"no start":            func(r *Record) { r.Start = "" },
		"no configuration":    func(r *Record) { r.Config = digest.Digest{} },
		"no image":            func(r *Record) { r.Image = digest.Digest{} },
		"no checks":           func(r *Record) { r.Inside.Checks = nil },
		"a failed check":      func(r *Record) { r.Inside.Checks[1].OK = false },
		"not sealed":          func(r *Record) { r.Inside.OK = false },
		"another bridge":      func(r *Record) { r.Inside.Version++ },
		"more than there may": func(r *Record) { r.Inside.Label = strings.Repeat("x", MaxSize) },
	} {
		r := sample(key.Address())
		change(r)
		if _, err := r.Encode(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := sample(key.Address()).Sign(other); err == nil {
		t.Error("signed another node's record")
	}
	_, raw := sign(t, sample(key.Address()), key)
	_, theirs := sign(t, sample(other.Address()), other)
	swap := func(a, b []byte) []byte { // the record of a, the signature of b
		i, j := bytes.LastIndex(a, []byte(`,"signature"`)), bytes.LastIndex(b, []byte(`,"signature"`))
		return append(bytes.Clone(a[:i]), b[j:]...)
	}
	for what, b := range map[string][]byte{
		"another's signature": swap(raw, theirs), "nothing": nil, "more than one": append(bytes.Clone(raw), raw...),
		"one more field": bytes.Replace(raw, []byte(`{"record"`), []byte(`{"x":1,"record"`), 1),
		"a field twice":  bytes.Replace(raw, []byte(`{"version":1,`), []byte(`{"version":1,"version":1,`), 1),
		"another order":  bytes.Replace(raw, []byte(`"uid":1000,"gid":1000`), []byte(`"gid":1000,"uid":1000`), 1),
		"large":          bytes.Repeat([]byte(" "), MaxSigned+1),
	} {
		if _, err := Open(b); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestDrift(t *testing.T) {
	fresh := func() *Views { return &sample(evm.Address{1}).Views }
	if d := Drift(fresh(), fresh()); len(d) > 0 {
		t.Errorf("equal views: %q", d)
	}
	for want, change := range map[string]func(*Views){
		"inside: mounts":     func(v *Views) { v.Inside.Mounts[0].ReadOnly = false },
		"inside: namespaces": func(v *Views) { v.Inside.Namespaces["net"] = "net:[9]" },
		"inside: devices":    func(v *Views) { v.Inside.Devices = nil },
		"inside: checks":     func(v *Views) { v.Inside.Checks[0].Got = "0" },
		"inside: interfaces": func(v *Views) {
			v.Inside.Interfaces[0].Addresses = append(v.Inside.Interfaces[0].Addresses, "10.0.0.1/8")
		},
		"outside: cgroup":        func(v *Views) { v.Outside.Cgroup = "/" },
		"outside: uids":          func(v *Views) { v.Outside.UIDs[1] = 0 },
		"outside: capabilities":  func(v *Views) { v.Outside.Capabilities = []string{"CapEff"} },
		"outside: noNewPrivs":    func(v *Views) { v.Outside.NoNewPrivs = false },
		"outside: routes":        func(v *Views) { v.Outside.Routes = []string{"eth0"} },
		"outside: seccomp":       func(v *Views) { v.Outside.Seccomp = 0 },
		"inside: uidMap was":     func(v *Views) { v.Inside.UIDMap = []contract.IDRange{{Inside: 1}} },
		"inside: cgroup was":     func(v *Views) { v.Inside.Cgroup = "/x" },
		"inside: landlock was 0": func(v *Views) { v.Inside.Landlock = 7 },
	} {
		v := fresh()
		change(v)
		if d := Drift(fresh(), v); len(d) != 1 || !strings.HasPrefix(d[0], want) {
			t.Errorf("%s: %q", want, d)
		}
	}
	for what, change := range map[string]func(*Views){
		"a dead tunnel of the kernel's": func(v *Views) {
			v.Inside.Interfaces = append(v.Inside.Interfaces, contract.Interface{Name: "sit0"})
			v.Outside.Interfaces = append(v.Outside.Interfaces, "sit0")
		},
		"a lower ceiling":  func(v *Views) { v.Outside.Memory /= 2 },
		"none and no list": func(v *Views) { v.Outside.Routes = []string{} },
	} {
		v := fresh()
		change(v)
		if d := Drift(fresh(), v); len(d) > 0 {
			t.Errorf("%s: %q", what, d)
		}
	}
}

// A machine with many devices still has a record.
func TestSize(t *testing.T) {
	key := newKey(t)
	r := sample(key.Address())
	for i := range 200 {
		r.Inside.Mounts = append(r.Inside.Mounts, contract.Mount{Point: fmt.Sprintf("/usr/lib/x86_64-linux-gnu/libnvidia-something-%d.so.999.99.99", i), Type: "ext4", ReadOnly: true})
	}
	if _, err := r.Encode(); err != nil {
		t.Error(err)
	}
	if slices.Contains(Drift(&r.Views, &r.Views), "") {
		t.Error("it differs from itself")
	}
}

func FuzzOpen(f *testing.F) {
	key := newKey(f)
	_, raw := sign(f, sample(key.Address()), key)
	f.Add(raw)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Open(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := Open(again); err != nil || back.Digest() != s.Digest() {
			t.Fatalf("does not survive printing: %v", err)
		}
	})
}
