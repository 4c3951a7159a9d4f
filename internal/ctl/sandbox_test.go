package ctl

import (
	"encoding/json"
	"os"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/sandbox/record"
)

// writeSandbox writes a record of a sandbox with control characters in it, the
// receipt of a job in it, and receipts that are not.
func writeSandbox(ts *testscript.TestScript, _ bool, _ []string) {
	key, err := evm.NewKey()
	ts.Check(err)
	other, err := evm.NewKey()
	ts.Check(err)
	d := func(s string) digest.Digest { return digest.Of([]byte(s)) }
	look := &record.Record{
		Version: record.Version, Node: key.Address(), Network: "testnet", Time: 999_999_000_000, Start: strings.Repeat("ab", 16), Config: d("c"), Image: d("i"),
		Views: record.Views{
			Inside: contract.Sandbox{
				Version: contract.Version, OK: true, UID: 1000, Checks: []contract.Check{{Name: "root", Want: "read-only", Got: "EROFS on a read-only mount", OK: true}},
				Namespaces: map[string]string{"net": "net:[4026532000]"}, Interfaces: []contract.Interface{{Name: "lo", Addresses: []string{"127.0.0.1/8"}}},
				Devices: []contract.Device{{Path: "/dev/null", Major: 1, Minor: 3}},
				Mounts:  []contract.Mount{{Point: "/models", Type: "ext4", ReadOnly: true}, {Point: "/\x1b[31m", Type: "tmpfs"}},
			},
			Outside: record.Outside{UIDs: []int{7, 7, 7, 7}, NoNewPrivs: true, Seccomp: 2, Cgroup: "/runtime.service", Memory: 1 << 30},
		},
	}
	s, err := look.Sign(key)
	ts.Check(err)
	write := func(name string, v any) {
		raw, err := json.Marshal(v)
		ts.Check(err)
		ts.Check(os.WriteFile(ts.MkAbs(name), raw, 0o600))
	}
	write("sandbox.json", s)
	for name, change := range map[string]func(*receipt.Receipt){
		"in.json":     func(*receipt.Receipt) {},
		"digest.json": func(r *receipt.Receipt) { r.Measured.SandboxDigest = d("another") },
		"config.json": func(r *receipt.Receipt) { r.Measured.ConfigDigest = d("another") },
		"image.json":  func(r *receipt.Receipt) { r.Measured.ImageDigest = d("another") },
		"node.json":   func(r *receipt.Receipt) { r.Node = other.Address() },
	} {
		r := receipt.Receipt{
			Job: receipt.NewJobID(), Node: key.Address(),
			Measured: receipt.Measured{ConfigDigest: d("c"), ImageDigest: d("i"), ModelDigest: d("m"), SandboxDigest: s.Digest(), RequestHash: d("q"), ResponseHash: d("a")},
			Claimed:  receipt.Claimed{ClassDigest: d("k")},
		}
		change(&r)
		by := key
		if r.Node == other.Address() {
			by = other
		}
		signed, err := r.Sign(31337, by)
		ts.Check(err)
		write(name, signed)
	}
}
