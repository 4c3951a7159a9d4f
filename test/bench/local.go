package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	gethcrypto "github.com/ethereum/go-ethereum/crypto"
	"github.com/ethereum/go-ethereum/signer/core/apitypes"
	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/model"
	"github.com/resultity/node/internal/model/fetch"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/test/host"
)

const chainID = 31337

// op is something to be timed in turn with others.
type op struct {
	name string
	f    func() error
}

// turns times each op by the testing package's means, in turns, and returns
// microseconds by name.
func turns(rounds int, span time.Duration, ops []op) (map[string][]float64, error) {
	if err := flag.Set("test.benchtime", span.String()); err != nil {
		return nil, err
	}
	us := map[string][]float64{}
	for range rounds {
		for _, o := range ops {
			var err error
			r := testing.Benchmark(func(b *testing.B) {
				for b.Loop() {
					if err = o.f(); err != nil {
						b.FailNow()
					}
				}
			})
			if err != nil {
				return nil, fmt.Errorf("%s: %w", o.name, err)
			}
			us[o.name] = append(us[o.name], float64(r.T.Nanoseconds())/float64(r.N)/1000)
		}
	}
	return us, nil
}

func crypto(_ context.Context, b *bench, t *table) (err error) {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "CGO_ENABLED" { // with cgo it is libsecp256k1 that signs and checks
				t.Measured += ", " + s.Key + "=" + s.Value
			}
		}
	}
	key, err := evm.NewKey()
	if err != nil {
		return err
	}
	r := receipt.Receipt{
		Job: receipt.NewJobID(), Node: key.Address(),
		Measured: receipt.Measured{
			ConfigDigest: digest.Of([]byte("c")), ImageDigest: digest.Of([]byte("i")), ModelDigest: digest.Of([]byte("m")), SandboxDigest: digest.Of([]byte("s")),
			RequestHash: digest.Of([]byte("q")), ResponseHash: digest.Of([]byte("a")),
		},
		Claimed: receipt.Claimed{
			ClassDigest: digest.Of([]byte("k")), PromptTokens: 100, CompletionTokens: 200, StartedAt: 1_790_000_000_000, FinishedAt: 1_790_000_001_000,
		},
	}
	signed, err := r.Sign(chainID, key)
	if err != nil {
		return err
	}
	raw, err := json.Marshal(signed)
	if err != nil {
		return err
	}
	var outer struct{ TypedData apitypes.TypedData }
	if err := json.Unmarshal(raw, &outer); err != nil {
		return err
	}
	hash := r.Hash(chainID)
	if want, _, err := apitypes.TypedDataAndHash(outer.TypedData); err != nil || string(want) != string(hash[:]) {
		return errors.Join(err, errors.New("our hash is not the one of apitypes"))
	}
	sig := signed.Signature()
	bare := sig
	bare[64] -= 27

	apart, stop, err := startSigner(key)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	ops := []op{
		{"bare sign", func() error { _, err := gethcrypto.Sign(hash[:], key.ECDSA()); return err }},
		{"bare recover", func() error { _, err := gethcrypto.SigToPub(hash[:], bare[:]); return err }},
		{"receipt hash", func() error { r.Hash(chainID); return nil }},
		{"receipt hash by apitypes", func() error { _, _, err := apitypes.TypedDataAndHash(outer.TypedData); return err }},
		{"receipt hash and sign", func() error { _, err := r.Sign(chainID, key); return err }},
		{"receipt by resultity-signer", func() error { _, err := apart.Receipt(chainID, r); return err }},
		{"receipt verify from JSON", func() error { _, err := receipt.Verify(raw); return err }},
	}
	// Frames as a node sends them: the first, which is signed, and then a token of
	// a stream and whole results, which are tagged.
	frames, err := frameOps(key, []frame{
		{"hello", &wire.Hello{Agent: "bench", Config: r.Measured.ConfigDigest}},
		{"chunk of 200 B", &wire.Chunk{Job: r.Job, Data: make([]byte, 200)}},
		{"result of 4 KiB", &wire.Result{Job: r.Job, Response: make([]byte, 4<<10), Receipt: &signed}},
		{"result of 64 KiB", &wire.Result{Job: r.Job, Response: make([]byte, 64<<10), Receipt: &signed}},
	})
	if err != nil {
		return err
	}
	ops = append(ops, frames...)
	us, err := turns(b.scale(7, 2), 100*time.Millisecond, ops)
	if err != nil {
		return err
	}
	for _, o := range ops {
		t.add(o.name, "µs", us[o.name])
	}
	t.add("receipt hash and sign / bare sign", "ratio", paired(us["receipt hash and sign"], us["bare sign"], over), atMost(1.25))
	t.add("receipt by resultity-signer / hash and sign", "ratio", paired(us["receipt by resultity-signer"], us["receipt hash and sign"], over))
	t.add("apitypes / receipt hash", "ratio", paired(us["receipt hash by apitypes"], us["receipt hash"], over), atLeast(5))
	t.add("seal hello / bare sign", "ratio", paired(us["seal hello"], us["bare sign"], over))
	t.add("open hello / bare recover", "ratio", paired(us["open hello"], us["bare recover"], over))
	t.add("seal chunk / bare sign", "ratio", paired(us["seal chunk of 200 B"], us["bare sign"], over), atMost(0.2))
	t.add("open chunk / bare recover", "ratio", paired(us["open chunk of 200 B"], us["bare recover"], over), atMost(0.2))
	return nil
}

type frame struct {
	name    string
	message wire.Message
}

// frameOps times what a frame costs its sender and its receiver. They are the
// first ones of one session: only the very first is signed.
func frameOps(key *evm.Key, frames []frame) ([]op, error) {
	ours, theirs := wire.NewSecret(), wire.NewSecret()
	session, err := ours.Agree("bench", key.Address(), ours.Public(), theirs.Public())
	if err != nil {
		return nil, err
	}
	sealer := wire.NewSealer(key, session, wire.ToNetwork, time.Now)
	opener := wire.NewOpener(func(a evm.Address) bool { return a == key.Address() }, session, wire.ToNetwork, time.Hour)
	var ops []op
	for _, f := range frames {
		// A frame is made and opened once: each time it is done by a copy of who
		// was to do it next.
		s, o := *sealer, *opener
		raw, err := sealer.Seal(nil, f.message)
		if err != nil {
			return nil, err
		}
		if _, err := opener.Open(raw, time.Now()); err != nil {
			return nil, err
		}
		buf := make([]byte, 0, len(raw))
		ops = append(ops, op{"seal " + f.name, func() error {
			s := s
			_, err := s.Seal(buf, f.message)
			return err
		}}, op{"open " + f.name, func() error {
			o := o
			_, err := o.Open(raw, time.Now())
			return err
		}})
	}
	return ops, nil
}

// source serves files over TLS, each of its size in bytes from one block, and
// knows when it has written the last byte of one.
type source struct {
	*httptest.Server
	block []byte
	last  atomic.Int64 // Unix nanoseconds
}

func newSource() *source {
	s := &source{block: make([]byte, 1<<20)}
	_, _ = rand.Read(s.block) // crypto/rand never fails: it ends the program instead
	copy(s.block, "GGUF\x03\x00\x00\x00")
	clear(s.block[8:24]) // no tensors and no metadata
	s.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		size, err := strconv.Atoi(strings.TrimPrefix(r.URL.Path, "/"))
		if err != nil {
			http.NotFound(w, r)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, s.content(size))
		_ = http.NewResponseController(w).Flush() // a client that is gone shows at its own end
		s.last.Store(time.Now().UnixNano())
	}))
	return s
}

// model is a model of one file of so many bytes.
func (s *source) model(size int) *snapshot.Model {
	f, err := snapshot.NewFile("model.gguf", s.content(size), fmt.Sprintf("%s/%d", s.URL, size))
	if err != nil {
		panic(err) // nothing is read but memory
	}
	return &snapshot.Model{Name: "bench", Version: "1", Format: snapshot.GGUF, Files: []snapshot.File{f}}
}

// content is the file of so many bytes.
func (s *source) content(size int) io.ReadSeeker {
	return io.NewSectionReader(repeated(s.block), 0, int64(size))
}

// repeated is one block without end.
type repeated []byte

func (r repeated) ReadAt(b []byte, off int64) (n int, err error) {
	for n < len(b) {
		n += copy(b[n:], r[(off+int64(n))%int64(len(r)):])
	}
	return n, nil
}

// store opens a model store that lives as long as f runs.
func (b *bench) store(s *source, f func(*model.Store) error) (err error) {
	dir, err := os.MkdirTemp(b.dir, "store-") // on the disk that models would be on
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	log := slog.New(slog.DiscardHandler)
	st, err := model.Open(dir, fetch.New(s.Client().Transport, nil, log), log)
	if err != nil {
		return err
	}
	return errors.Join(f(st), st.Close())
}

const (
	small = 64 << 20
	large = 512 << 20
)

func verify(ctx context.Context, b *bench, t *table) error {
	s := newSource()
	defer s.Close()
	m := s.model(large)
	return b.store(s, func(st *model.Store) error {
		dir, err := st.Ensure(ctx, m, nil)
		if err != nil {
			return err
		}
		file := filepath.Join(dir, m.Files[0].Path)
		command := func(name string, args ...string) func() (time.Duration, error) {
			return func() (time.Duration, error) {
				cmd := exec.CommandContext(ctx, name, append(args, file)...)
				if out, err := cmd.CombinedOutput(); err != nil {
					return 0, fmt.Errorf("%s: %w: %s", name, err, out)
				}
				return cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
			}
		}
		ways := []struct {
			name string
			f    func() (cpu time.Duration, err error)
		}{
			{"model store", func() (time.Duration, error) {
				before := cpuTime()
				err := st.Verify(ctx, m)
				return cpuTime() - before, err
			}},
			{"openssl dgst -sha256", command("openssl", "dgst", "-sha256")},
			{"sha256sum", command("sha256sum")},
		}
		rate := func(d time.Duration) float64 { return large / d.Seconds() / 1e9 }
		wall, cpu := map[string][]float64{}, map[string][]float64{}
		for range b.scale(7, 2) {
			for _, w := range ways {
				begin := time.Now()
				used, err := w.f()
				if err != nil {
					return err
				}
				wall[w.name] = append(wall[w.name], rate(time.Since(begin)))
				cpu[w.name] = append(cpu[w.name], rate(used))
			}
		}
		for _, w := range ways {
			t.add(w.name, "GB/s", wall[w.name])
			t.add(w.name+", of CPU time", "GB/s", cpu[w.name])
		}
		ours, openssl, coreutils := ways[0].name, ways[1].name, ways[2].name
		t.add("model store / openssl", "ratio", paired(wall[ours], wall[openssl], over), atLeast(0.95))
		t.add("model store / openssl, of CPU time", "ratio", paired(cpu[ours], cpu[openssl], over), atLeast(0.95))
		t.add("model store / sha256sum, of CPU time", "ratio", paired(cpu[ours], cpu[coreutils], over))
		return nil
	})
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err) // it has no way to fail
	}
	return time.Duration(syscall.TimevalToNsec(syscall.Timeval(u.Utime)) + syscall.TimevalToNsec(syscall.Timeval(u.Stime)))
}

func download(ctx context.Context, b *bench, t *table) error {
	s := newSource()
	defer s.Close()
	models := []*snapshot.Model{s.model(small), s.model(large)}
	after := make([][]float64, len(models))
	var again []float64
	err := b.store(s, func(st *model.Store) error {
		for range b.scale(7, 2) {
			for i, m := range models {
				if _, err := st.Ensure(ctx, m, nil); err != nil {
					return err
				}
				after[i] = append(after[i], float64(time.Since(time.Unix(0, s.last.Load())).Microseconds())/1000)
				begin := time.Now()
				if err := st.Verify(ctx, m); err != nil {
					return err
				}
				if m.Size() == large {
					again = append(again, float64(time.Since(begin).Microseconds())/1000)
				}
				if err := st.Retain(nil); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	t.add("64 MiB", "ms", after[0])
	t.add("512 MiB", "ms", after[1])
	t.add("a second pass over 512 MiB, for comparison", "ms", again)
	// A second pass would make the larger file wait for 7/8 of its time longer.
	grown := paired(after[1], after[0], minus)
	t.add("growth / second pass over what is more", "ratio", paired(grown, again, func(g, a float64) float64 { return g / (a * (large - small) / large) }), atMost(0.05))
	return nil
}

func boot(ctx context.Context, b *bench, t *table) (err error) {
	releases := []host.Release{host.Trixie, host.Forky}
	for _, r := range releases {
		if err := host.Prepare(ctx, os.Stderr, host.Image{Release: r, Role: host.Node}); err != nil {
			return err
		}
	}
	lab, err := host.Create(ctx, host.Options{Name: fmt.Sprintf("bench-boot-%d", os.Getpid())})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	took := map[host.Release][]float64{}
	for range b.scale(5, 1) {
		for _, r := range releases {
			begin := time.Now()
			h, err := lab.Up(ctx, host.Config{Name: "boot", Release: r})
			if err != nil {
				return err
			}
			took[r] = append(took[r], time.Since(begin).Seconds())
			if err := h.Down(ctx); err != nil {
				return err
			}
		}
	}
	for _, r := range releases {
		t.add(string(r), "s", took[r], atMost(5))
	}
	return nil
}
