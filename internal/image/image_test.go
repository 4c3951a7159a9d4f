package image

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	intoto "github.com/in-toto/attestation/go/v1"
	cobundle "github.com/sigstore/cosign/v2/pkg/cosign/bundle"
	cotypes "github.com/sigstore/cosign/v2/pkg/types"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/sigstore/sigstore/pkg/signature/dsse"
	"github.com/sigstore/sigstore/pkg/signature/payload"
	"go.podman.io/image/v5/docker"
	podmanimage "go.podman.io/image/v5/image"
	podmanmanifest "go.podman.io/image/v5/manifest"
	podmanpolicy "go.podman.io/image/v5/signature"
	"go.podman.io/image/v5/types"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/policy"
	"github.com/resultity/node/test/oci"
	"github.com/resultity/node/test/oci/ocitest"
)

// world is a registry, a policy directory and a stand-in for Podman on them.
type world struct {
	t   *testing.T
	srv *ocitest.Server
	reg *oci.Registry
	dir string
	tr  *http.Transport
	pod *standIn
	img *Images
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, srv: ocitest.Serve(t), dir: filepath.Join(t.TempDir(), "home", ".config", "containers")}
	w.reg = oci.NewRegistry(w.srv.Host, w.srv.CA)
	t.Cleanup(w.reg.Close)
	w.tr = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: w.srv.CA}}
	t.Cleanup(w.tr.CloseIdleConnections)
	w.pod = &standIn{t: t, dir: w.dir, stored: map[snapshot.ImageRef]bool{}}
	w.img = w.open()
	return w
}

// open starts anew on the same directory.
func (w *world) open() *Images {
	w.t.Helper()
	i, err := New(w.tr, w.pod, w.dir, w.srv.CAPEM, slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	return i
}

func (w *world) push(repo, content string) (name.Digest, snapshot.ImageRef) {
	w.t.Helper()
	img, err := oci.Single("program", []byte(content))
	if err != nil {
		w.t.Fatal(err)
	}
	d, err := w.reg.Push(w.t.Context(), repo, img)
	if err != nil {
		w.t.Fatal(err)
	}
	ref, err := snapshot.ParseImageRef(d.String())
	if err != nil {
		w.t.Fatal(err)
	}
	return d, ref
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func newKey(t *testing.T) (*oci.Key, string) {
	t.Helper()
	k, err := oci.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	b, err := k.PublicPEM()
	if err != nil {
		t.Fatal(err)
	}
	return k, string(b)
}

// ensure is Ensure of an image that any one of the keys may sign.
func ensure(t *testing.T, i *Images, ref snapshot.ImageRef, keys ...string) error {
	t.Helper()
	trust := &snapshot.ImageTrust{Keys: keys}
	return i.Ensure(t.Context(), ref, trust, trust)
}

// errPolicy is the stand-in's refusal.
var errPolicy = errors.New("refused by policy")

// standIn is Podman without its storage: it decides as Podman does, with
// Podman's own code on the files in dir.
type standIn struct {
	t      *testing.T
	dir    string
	mu     sync.Mutex // guards what follows
	stored map[snapshot.ImageRef]bool
	pulls  int

	away   error // what it says to a look while it is away
	loses  bool  // say that a pull went well, and store nothing
	damage []string
	begun  chan string                    // is told of what begins to wait; nil where nothing does
	slow   map[snapshot.ImageRef]chan any // pulls that wait
	reads  chan any                       // what Damage waits for; nil for nothing
	index  snapshot.ImageRef              // an index, whose images are all called stored with it
}

func (p *standIn) Pull(ctx context.Context, ref snapshot.ImageRef, _ io.Writer) error {
	if c := p.slow[ref]; c != nil {
		p.begun <- "pull"
		select {
		case <-c:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pulls++
	if err := p.allowed(ctx, ref); err != nil {
		return err
	}
	if !p.loses {
		p.stored[ref] = true
	}
	return nil
}

func (p *standIn) allowed(ctx context.Context, ref snapshot.ImageRef) error {
	sys := &types.SystemContext{
		SignaturePolicyPath:      filepath.Join(p.dir, "policy.json"),
		RegistriesDirPath:        filepath.Join(p.dir, "registries.d"),
		DockerPerHostCertDirPath: filepath.Join(p.dir, "certs.d"),
	}
	pol, err := podmanpolicy.DefaultPolicy(sys)
	if err != nil {
		p.t.Errorf("Podman cannot read the policy: %v", err)
		return err
	}
	pc, err := podmanpolicy.NewPolicyContext(pol)
	if err != nil {
		return err
	}
	defer pc.Destroy() // nothing was written
	r, err := docker.ParseReference("//" + ref.String())
	if err != nil {
		return err
	}
	src, err := r.NewImageSource(ctx, sys)
	if err != nil {
		return err
	}
	defer src.Close() // only read from
	// Of an index, it is the image for this machine that Podman looks at.
	looked := podmanimage.UnparsedInstance(src, nil)
	raw, kind, err := src.GetManifest(ctx, nil)
	if err != nil {
		return err
	}
	if podmanmanifest.MIMETypeIsMultiImage(kind) {
		list, err := podmanmanifest.ListFromBlob(raw, kind)
		if err != nil {
			return err
		}
		chosen, err := list.ChooseInstance(sys)
		if err != nil {
			return err
		}
		looked = podmanimage.UnparsedInstance(src, &chosen)
	}
	ok, err := pc.IsRunningImageAllowed(ctx, looked)
	if !ok {
		return fmt.Errorf("%w: %w", errPolicy, err)
	}
	return err
}

func (p *standIn) Image(_ context.Context, ref snapshot.ImageRef) (string, int64, error) {
	if p.away != nil {
		return "", 0, p.away
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	// What an index came to is stored under its own digest as well.
	for other, ok := range p.stored {
		if ok && other.Repository() == ref.Repository() && (other == ref || p.index == other) {
			return "id", 1, nil
		}
	}
	return "", 0, errNotStored
}

var errNotStored = errors.New("not stored")

func (p *standIn) Has(ctx context.Context, ref snapshot.ImageRef) (bool, error) {
	_, _, err := p.Image(ctx, ref)
	if errors.Is(err, errNotStored) {
		return false, nil
	}
	return err == nil, err
}

func (p *standIn) Damage(context.Context, snapshot.ImageRef) ([]string, error) {
	if p.reads != nil {
		p.begun <- "damage"
		<-p.reads
	}
	return p.damage, nil
}

func (p *standIn) RemoveImages(_ context.Context, pulled, keep []snapshot.ImageRef) (gone []snapshot.ImageRef, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, ref := range pulled {
		if slices.Contains(keep, ref) {
			p.t.Errorf("asked to remove %s, which is kept", ref)
		}
		delete(p.stored, ref)
		gone = append(gone, ref)
	}
	return gone, nil
}

func TestEnsure(t *testing.T) {
	w := newWorld(t)
	k, pub := newKey(t)
	_, other := newKey(t)
	d, ref := w.push("net/runtime", "a")
	w.must(w.reg.Sign(t.Context(), d, k))
	// Any one of the keys is enough, wherever it stands.
	for _, keys := range [][]string{{pub}, {other, pub}, {pub, other}} {
		w.pod.stored[ref] = false
		if err := ensure(t, w.img, ref, keys...); err != nil {
			t.Fatal(err)
		}
		if !w.pod.stored[ref] {
			t.Fatal("not pulled")
		}
	}
	// With both things there, the registry is not needed, but the key is.
	pulls := w.pod.pulls
	w.tr.TLSClientConfig.RootCAs = nil
	w.tr.CloseIdleConnections()
	if err := ensure(t, w.open(), ref, pub); err != nil || w.pod.pulls != pulls {
		t.Errorf("without the registry: %v, %d pulls", err, w.pod.pulls-pulls)
	}
	if err := ensure(t, w.open(), ref, other); err == nil {
		t.Error("goes on with a key that was taken away")
	}
	// A record that was changed proves nothing.
	file := filepath.Join(w.dir, recordName(ref))
	raw, err := os.ReadFile(file)
	w.must(err)
	var e entry
	w.must(json.Unmarshal(raw, &e))
	for i := range e.Signatures {
		a := &e.Signatures[i]
		a.Payload = bytes.Replace(a.Payload, []byte("runtime"), []byte("runtimf"), 1)
	}
	raw, err = json.Marshal(e)
	w.must(err)
	w.must(os.WriteFile(file, raw, 0o600))
	if err := ensure(t, w.open(), ref, pub); err == nil {
		t.Error("believes a changed record")
	}
}

// A damaged image of the agent's own is fetched again. Somebody else's is his, until
// he has removed it.
func TestVerify(t *testing.T) {
	for _, foreign := range []bool{false, true} {
		w := newWorld(t)
		k, pub := newKey(t)
		d, ref := w.push("net/runtime", "a")
		w.must(w.reg.Sign(t.Context(), d, k))
		w.pod.stored[ref] = foreign
		w.must(ensure(t, w.img, ref, pub))
		w.must(w.img.Verify(t.Context(), ref))
		w.pod.damage = []string{"layer x: content incorrect digest"}
		err := w.img.Verify(t.Context(), ref)
		if !errors.Is(err, ErrAltered) || w.pod.stored[ref] != foreign {
			t.Errorf("foreign %v: %v, stored %v", foreign, err, w.pod.stored[ref])
		}
		if !foreign {
			continue
		}
		if !strings.Contains(err.Error(), "podman image rm") {
			t.Errorf("nobody is told what to do: %v", err)
		}
		w.pod.stored[ref] = false
		w.must(ensure(t, w.img, ref, pub))
		if err := w.img.Verify(t.Context(), ref); !errors.Is(err, ErrAltered) || w.pod.stored[ref] {
			t.Errorf("brought anew: %v, stored %v", err, w.pod.stored[ref])
		}
	}
	w := newWorld(t)
	_, ref := w.push("net/runtime", "a")
	w.pod.stored[ref], w.pod.damage = true, []string{"x"}
	if err := w.img.Verify(t.Context(), ref); !errors.Is(err, ErrAltered) || !w.pod.stored[ref] {
		t.Errorf("of nobody knows whom: %v, stored %v", err, w.pod.stored[ref])
	}
}

// Reading a large image takes minutes, and a slow registry longer. Nobody else waits.
func TestNobodyWaits(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	k, pub := newKey(t)
	trust := &snapshot.ImageTrust{Keys: []string{pub}}
	d, a := w.push("one/runtime", "a")
	w.must(w.reg.Sign(ctx, d, k))
	d, b := w.push("two/runtime", "b")
	w.must(w.reg.Sign(ctx, d, k))
	w.pod.begun = make(chan string)
	w.pod.slow = map[snapshot.ImageRef]chan any{a: make(chan any)}
	var wait sync.WaitGroup
	defer wait.Wait()

	pctx, giveUp := context.WithCancel(ctx)
	defer giveUp()
	wait.Go(func() {
		if err := w.img.Ensure(ctx, a, trust, trust); err != nil {
			t.Errorf("the slow one: %v", err)
		}
	})
	<-w.pod.begun
	if err := w.img.Ensure(ctx, b, trust, trust); err != nil {
		t.Fatalf("beside a slow pull: %v", err)
	}
	for ref, repo := range map[snapshot.ImageRef]string{a: "one/runtime", b: "two/runtime"} {
		raw, err := os.ReadFile(filepath.Join(w.dir, policyFile))
		w.must(err)
		if !strings.Contains(string(raw), repo) {
			t.Errorf("the policy does not name %s: %s", ref, raw)
		}
	}
	// The same repository's next image waits, and no longer than it wants.
	second := make(chan error, 1)
	wait.Go(func() { second <- w.img.Ensure(pctx, a, trust, trust) })
	giveUp()
	if err := <-second; !errors.Is(err, context.Canceled) {
		t.Errorf("who gave up: %v", err)
	}
	if err := w.img.Retain(ctx, b); err == nil || !strings.Contains(err.Error(), "being brought") {
		t.Errorf("what is being brought is removed: %v", err)
	}
	w.pod.reads = make(chan any)
	wait.Go(func() {
		if err := w.img.Verify(ctx, b); err != nil {
			t.Errorf("the slow reader: %v", err)
		}
	})
	<-w.pod.begun
	if got := w.img.Manifest(b); got != b.Digest() {
		t.Errorf("%s is %s", b, got)
	}
	if err := w.img.Trusted(ctx, b, trust, trust); err != nil {
		t.Error(err)
	}
	if err := w.img.Ensure(ctx, b, trust, trust); err != nil {
		t.Error(err)
	}
	if err := w.img.Verify(pctx, b); !errors.Is(err, context.Canceled) {
		t.Errorf("a second reader who gave up: %v", err)
	}
	close(w.pod.reads)
	close(w.pod.slow[a])
	wait.Wait()
	w.must(w.img.Ensure(ctx, b, trust, trust))
	raw, err := os.ReadFile(filepath.Join(w.dir, policyFile))
	w.must(err)
	if strings.Contains(string(raw), "one/runtime") {
		t.Errorf("the policy still names what nobody works on: %s", raw)
	}
}

// Networks that share an image may have it signed by different people. None of
// them needs the registry for what was found for it before.
func TestEachNetworksSignatureIsKept(t *testing.T) {
	w := newWorld(t)
	d, ref := w.push("net/runtime", "a")
	var keys []string
	for range maxKept {
		k, pub := newKey(t)
		w.must(w.reg.Sign(t.Context(), d, k))
		keys = append(keys, pub)
	}
	for range 2 {
		for _, k := range keys {
			if err := ensure(t, w.img, ref, k); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.tr.TLSClientConfig.RootCAs = nil
	w.tr.CloseIdleConnections()
	for n, k := range keys {
		if err := ensure(t, w.open(), ref, k); err != nil {
			t.Errorf("network %d: %v", n, err)
		}
	}
	rec, known := w.img.record(ref)
	if !known || len(rec.Signatures) != maxKept {
		t.Errorf("%d signatures are kept, want %d", len(rec.Signatures), maxKept)
	}
	rec.add(&attached{})
	if len(rec.Signatures) != maxKept {
		t.Errorf("%d signatures are kept, at most %d", len(rec.Signatures), maxKept)
	}
}

// TestRefused shows both locks each distrusted image, one at a time: ours, and
// Podman's code on the files that we wrote.
func TestRefused(t *testing.T) {
	k, pub := newKey(t)
	stranger, _ := newKey(t)
	cases := map[string]struct {
		sign func(w *world, d name.Digest) error
		want error
	}{
		"unsigned":    {func(*world, name.Digest) error { return nil }, ErrUnsigned},
		"another key": {func(w *world, d name.Digest) error { return w.reg.Sign(t.Context(), d, stranger) }, ErrWrongKey},
		"bundle of another key": {func(w *world, d name.Digest) error {
			return w.reg.SignBundle(t.Context(), d, stranger)
		}, ErrWrongKey},
		"signature of another digest": {func(w *world, d name.Digest) error {
			o, _ := w.push("net/runtime", "other")
			return w.reg.SignAs(t.Context(), d, o, k)
		}, ErrOtherDigest},
		"signature for another repository": {func(w *world, d name.Digest) error {
			o := d.Repository.Registry.Repo("net/elsewhere").Digest(d.DigestStr())
			return w.reg.SignAs(t.Context(), d, o, k)
		}, ErrIdentity},
		"signature for another registry": {func(w *world, d name.Digest) error {
			o, err := name.NewDigest("registry.test/net/runtime@" + d.DigestStr())
			if err != nil {
				return err
			}
			return w.reg.SignAs(t.Context(), d, o, k)
		}, ErrIdentity},
	}
	for what, c := range cases {
		t.Run(what, func(t *testing.T) {
			w := newWorld(t)
			d, ref := w.push("net/runtime", "bad")
			w.must(c.sign(w, d))
			err := ensure(t, w.img, ref, pub)
			t.Logf("expected: %v; got: %v", c.want, err)
			if !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			if w.pod.pulls != 0 {
				t.Error("pulled before it was trusted")
			}
			// The other lock, alone.
			err = w.pod.allowed(t.Context(), ref)
			t.Logf("by Podman's policy: expected: %v; got: %v", errPolicy, err)
			if !errors.Is(err, errPolicy) {
				t.Errorf("Podman would take it: %v", err)
			}
			// Nothing but the signature is wrong with either of them.
			w.must(w.reg.Sign(t.Context(), d, k))
			if err := ensure(t, w.img, ref, pub); err != nil {
				t.Errorf("signed: %v", err)
			}
		})
	}

	t.Run("statement of another kind", func(t *testing.T) {
		w := newWorld(t)
		d, ref := w.push("net/runtime", "a")
		w.must(w.reg.SignBundle(t.Context(), d, k))
		a, err := bundles(d, w.reg.Options(t.Context()))
		w.must(err)
		if len(a) != 1 {
			t.Fatalf("%d bundles", len(a))
		}
		ks, err := load(&snapshot.ImageTrust{Keys: []string{pub}})
		w.must(err)
		if err := a[0].check(t.Context(), ref, ks); err != nil {
			t.Fatal(err)
		}
		_, wrong := w.push("net/runtime", "b")
		err = a[0].check(t.Context(), wrong, ks)
		t.Logf("of another image: expected: %v; got: %v", ErrOtherDigest, err)
		if !errors.Is(err, ErrOtherDigest) {
			t.Errorf("of another image: %v", err)
		}
		// Signed by the right key about the right image, but an inventory of it.
		for kind, want := range map[string]error{cotypes.CosignSignPredicateType: nil, "https://spdx.dev/Document": ErrUnsigned} {
			raw, key := statement(t, d, kind)
			by, err := keySigner(key)
			w.must(err)
			err = checkBundle(raw, ref, by)
			t.Logf("%s: expected: %v; got: %v", kind, want, err)
			if !errors.Is(err, want) {
				t.Errorf("statement %s: %v, want %v", kind, err, want)
			}
		}
	})
	t.Run("payload of another kind", func(t *testing.T) {
		w := newWorld(t)
		d, ref := w.push("net/runtime", "a")
		for kind, want := range map[string]error{payload.CosignSignatureType: nil, "atomic container signature": ErrIdentity} {
			p := payload.Cosign{Image: d}.SimpleContainerImage()
			p.Critical.Type = kind
			body, err := json.Marshal(p)
			w.must(err)
			priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			w.must(err)
			key, err := signature.LoadECDSASignerVerifier(priv, crypto.SHA256)
			w.must(err)
			sig, err := key.SignMessage(bytes.NewReader(body))
			w.must(err)
			a := &attached{Payload: body, Signature: base64.StdEncoding.EncodeToString(sig)}
			by, err := keySigner(key)
			w.must(err)
			err = a.check(t.Context(), ref, []*signer{by})
			t.Logf("%s: expected: %v; got: %v", kind, want, err)
			if !errors.Is(err, want) {
				t.Errorf("payload of type %s: %v, want %v", kind, err, want)
			}
		}
	})
	t.Run("every byte of a signature", func(t *testing.T) {
		w := newWorld(t)
		d, ref := w.push("net/runtime", "a")
		w.must(w.reg.Sign(t.Context(), d, k))
		a, err := classics(d, w.reg.Options(t.Context()))
		w.must(err)
		ks, err := load(&snapshot.ImageTrust{Keys: []string{pub}})
		w.must(err)
		if err := a[0].check(t.Context(), ref, ks); err != nil {
			t.Fatal(err)
		}
		for n := range a[0].Payload {
			bad := &attached{Payload: bytes.Clone(a[0].Payload), Signature: a[0].Signature}
			bad.Payload[n] ^= 1
			err := bad.check(t.Context(), ref, ks)
			if !errors.Is(err, ErrWrongKey) {
				t.Fatalf("byte %d: %v", n, err)
			}
			if n == 0 {
				t.Logf("expected: %v, %d times; got: %v", ErrWrongKey, len(a[0].Payload), err)
			}
		}
	})
	t.Run("no keys", func(t *testing.T) {
		w := newWorld(t)
		_, ref := w.push("net/runtime", "a")
		for _, keys := range [][]string{nil, {""}, {"x"}, {pub, "x"}} {
			err := ensure(t, w.img, ref, keys...)
			t.Logf("%d keys: expected: %v; got: %v", len(keys), ErrKeys, err)
			if !errors.Is(err, ErrKeys) {
				t.Errorf("%q: %v", keys, err)
			}
		}
	})
}

// statement is a bundle with a signed statement of a kind about d, and its key.
func statement(t *testing.T, d name.Digest, kind string) ([]byte, signature.Verifier) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	key, err := signature.LoadECDSASignerVerifier(priv, crypto.SHA256)
	check(err)
	body, err := protojson.Marshal(&intoto.Statement{
		Type:          intoto.StatementTypeUri,
		Subject:       []*intoto.ResourceDescriptor{{Digest: map[string]string{"sha256": strings.TrimPrefix(d.DigestStr(), "sha256:")}}},
		PredicateType: kind,
	})
	check(err)
	env, err := dsse.WrapSigner(key, cotypes.IntotoPayloadType).SignMessage(bytes.NewReader(body))
	check(err)
	pub, err := cryptoutils.MarshalPublicKeyToPEM(priv.Public())
	check(err)
	raw, err := cobundle.MakeNewBundle(priv.Public(), nil, body, env, pub, nil)
	check(err)
	return raw, key
}

// TestBundleAlone: the first lock takes it, Podman cannot, and the error says
// what to do.
func TestBundleAlone(t *testing.T) {
	w := newWorld(t)
	k, pub := newKey(t)
	d, ref := w.push("net/runtime", "a")
	w.must(w.reg.SignBundle(t.Context(), d, k))
	err := ensure(t, w.img, ref, pub)
	if !errors.Is(err, ErrPull) || !errors.Is(err, errPolicy) || !strings.Contains(err.Error(), "--new-bundle-format=false") {
		t.Errorf("error %v", err)
	}
	w.must(w.reg.Sign(t.Context(), d, k))
	if err := ensure(t, w.img, ref, pub); err != nil {
		t.Error(err)
	}
}

func TestPolicyNamesOneRepository(t *testing.T) {
	w := newWorld(t)
	k, pub := newKey(t)
	read := func() string {
		b, err := os.ReadFile(filepath.Join(w.dir, "policy.json"))
		w.must(err)
		return string(b)
	}
	if got := read(); got != string(policy.JSON) {
		t.Errorf("before any configuration: %s", got)
	}
	da, a := w.push("net/a", "a")
	db, b := w.push("net/b", "b")
	w.must(w.reg.Sign(t.Context(), da, k))
	w.must(w.reg.Sign(t.Context(), db, k))
	w.must(ensure(t, w.img, a, pub))
	if err := w.pod.allowed(t.Context(), b); !errors.Is(err, errPolicy) {
		t.Errorf("b is allowed with a: %v", err)
	}
	w.must(ensure(t, w.img, b, pub))
	if err := w.pod.allowed(t.Context(), a); !errors.Is(err, errPolicy) {
		t.Errorf("a is still allowed: %v", err)
	}
	// A start without a configuration keeps what there is, and knows nothing of it.
	before := read()
	if written, err := w.img.CheckPolicy(); !written || err != nil {
		t.Errorf("CheckPolicy = %v, %v", written, err)
	}
	if written, err := w.open().CheckPolicy(); written || err != nil {
		t.Errorf("CheckPolicy of a new start = %v, %v", written, err)
	}
	if read() != before {
		t.Error("opening changed the policy")
	}
	// Loosened for this repository alone.
	loose := strings.Replace(before, `"type": "sigstoreSigned"`, `"type": "insecureAcceptAnything"`, 1)
	if loose == before {
		t.Fatal(before)
	}
	w.must(os.WriteFile(filepath.Join(w.dir, "policy.json"), []byte(loose), 0o600))
	if written, err := w.img.CheckPolicy(); !written || !errors.Is(err, ErrPolicy) {
		t.Errorf("CheckPolicy of a loosened one = %v, %v", written, err)
	}
	w.must(ensure(t, w.img, b, pub))
	if written, err := w.img.CheckPolicy(); !written || err != nil {
		t.Errorf("CheckPolicy of the next = %v, %v", written, err)
	}
	// The authority goes with the registry that it is for.
	w.img.ca = nil
	w.must(ensure(t, w.img, b, pub))
	if left, err := os.ReadDir(filepath.Join(w.dir, "certs.d")); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestPullMustStore(t *testing.T) {
	w := newWorld(t)
	k, pub := newKey(t)
	d, ref := w.push("net/runtime", "a")
	w.must(w.reg.Sign(t.Context(), d, k))
	w.pod.loses = true
	if err := ensure(t, w.img, ref, pub); !errors.Is(err, ErrPull) {
		t.Errorf("error %v", err)
	}
}

func TestRetain(t *testing.T) {
	w := newWorld(t)
	k, pub := newKey(t)
	refs := map[string]snapshot.ImageRef{}
	for _, n := range []string{"kept", "dropped", "foreign"} {
		d, ref := w.push("net/"+n, n)
		w.must(w.reg.Sign(t.Context(), d, k))
		refs[n] = ref
		w.pod.stored[ref] = n == "foreign" // the user had it already
		w.must(ensure(t, w.img, ref, pub))
		w.must(ensure(t, w.img, ref, pub)) // does not make it ours
	}
	w.must(os.WriteFile(filepath.Join(w.dir, records, "x.json"), []byte("{}"), 0o600))
	w.must(w.img.Retain(t.Context(), refs["kept"]))
	for n, want := range map[string]bool{"kept": true, "dropped": false, "foreign": true} {
		if w.pod.stored[refs[n]] != want {
			t.Errorf("%s: stored %v", n, !want)
		}
	}
	left, err := os.ReadDir(filepath.Join(w.dir, records))
	if err != nil || len(left) != 1 {
		t.Errorf("records left: %v, %v", left, err)
	}
}

// Whose image it is, Podman has to say: one that was away when it was asked has not
// said that there was none.
func TestAwayAtTheFirstLook(t *testing.T) {
	for _, known := range []bool{false, true} {
		w := newWorld(t)
		k, pub := newKey(t)
		d, ref := w.push("net/runtime", "a")
		w.must(w.reg.Sign(t.Context(), d, k))
		w.pod.stored[ref] = true // the user had it already
		if known {
			w.must(ensure(t, w.img, ref, pub))
		}
		w.pod.away = errors.New("connection refused")
		if err := ensure(t, w.img, ref, pub); !errors.Is(err, w.pod.away) {
			t.Errorf("known %v: error %v", known, err)
		}
		w.pod.away = nil
		w.must(ensure(t, w.img, ref, pub))
		w.must(w.img.Retain(t.Context()))
		if !w.pod.stored[ref] {
			t.Errorf("known %v: the user's own image was removed", known)
		}
	}
}

// A record that is being written is not taken for what a crash has left.
func TestRetainBesideEnsure(t *testing.T) {
	w := newWorld(t)
	_, ref := w.push("net/runtime", "a")
	over := make(chan any)
	go func() {
		defer close(over)
		for n := range 200 {
			if err := w.img.keep(ref, entry{Image: ref, Manifest: ref.Digest(), Foreign: n%2 == 0}); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for {
		select {
		case <-over:
			return
		default:
			w.must(w.img.Retain(t.Context(), ref))
		}
	}
}

// What is found again and again is kept once: it is not to push out what other
// networks trust.
func TestSameSignatureIsKeptOnce(t *testing.T) {
	w := newWorld(t)
	k, pub := newKey(t)
	d, ref := w.push("net/runtime", "a")
	w.must(w.reg.Sign(t.Context(), d, k))
	w.pod.loses = true
	for range 3 {
		if err := ensure(t, w.img, ref, pub); !errors.Is(err, ErrPull) {
			t.Fatal(err)
		}
	}
	if e, _ := w.img.record(ref); len(e.Signatures) != 1 {
		t.Errorf("%d signatures are kept", len(e.Signatures))
	}
}

// TestHostileRegistry answers with what no honest registry sends.
func TestHostileRegistry(t *testing.T) {
	_, pub := newKey(t)
	ref, err := snapshot.ParseImageRef("registry.test/a@sha256:" + strings.Repeat("ab", 32))
	if err != nil {
		t.Fatal(err)
	}
	answer := func(code int, body io.Reader) http.RoundTripper {
		return roundTrip(func(r *http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: code, Header: http.Header{}, Body: io.NopCloser(body), Request: r, ContentLength: -1}, nil
		})
	}
	for what, rt := range map[string]http.RoundTripper{
		"down":     roundTrip(func(*http.Request) (*http.Response, error) { return nil, errors.New("connection refused") }),
		"endless":  answer(http.StatusOK, zeros{}),
		"forbids":  answer(http.StatusForbidden, strings.NewReader("")),
		"nonsense": answer(http.StatusOK, strings.NewReader("<html>")),
		"to http": roundTrip(func(r *http.Request) (*http.Response, error) {
			if r.URL.Scheme != "https" {
				t.Errorf("asked %s", r.URL)
			}
			return &http.Response{StatusCode: http.StatusTemporaryRedirect, Body: http.NoBody, Request: r,
				Header: http.Header{"Location": {"http://" + r.URL.Host + r.URL.Path}}}, nil
		}),
	} {
		t.Run(what, func(t *testing.T) {
			pod := &standIn{t: t, stored: map[snapshot.ImageRef]bool{}}
			i, err := New(rt, pod, t.TempDir(), nil, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			err = ensure(t, i, ref, pub)
			t.Logf("expected: it could not be asked, and no word about the image; got: %v", err)
			if err == nil || pod.pulls != 0 {
				t.Fatalf("error %v, %d pulls", err, pod.pulls)
			}
			// Not a word about the image: it may be fine.
			for _, verdict := range []error{ErrUnsigned, ErrWrongKey, ErrOtherDigest, ErrIdentity} {
				if errors.Is(err, verdict) {
					t.Errorf("says that %v", err)
				}
			}
		})
	}
}

// A registry that stops talking, before its answer or in the middle of it, is
// not waited for.
func TestRegistryHangs(t *testing.T) {
	_, pub := newKey(t)
	ref, err := snapshot.ParseImageRef("registry.test/a@sha256:" + strings.Repeat("ab", 32))
	if err != nil {
		t.Fatal(err)
	}
	for what, rt := range map[string]http.RoundTripper{
		"before": roundTrip(func(r *http.Request) (*http.Response, error) {
			<-r.Context().Done()
			return nil, context.Cause(r.Context())
		}),
		"in the middle": roundTrip(func(r *http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(hangs{r.Context()}), Request: r, ContentLength: -1}, nil
		}),
	} {
		i, err := New(rt, &standIn{t: t, stored: map[snapshot.ImageRef]bool{}}, t.TempDir(), nil, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		i.stall = 50 * time.Millisecond
		err = ensure(t, i, ref, pub)
		t.Logf("%s: expected: %v; got: %v", what, errStalled, err)
		if !errors.Is(err, errStalled) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// hangs is a body that never comes.
type hangs struct{ context.Context }

func (h hangs) Read([]byte) (int, error) { <-h.Done(); return 0, context.Cause(h) }

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
