package image_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/test/oci"
)

// This file says of each image that a network could order what both locks have
// to say. It is tried twice: here, with Podman's own code, and on real hosts.

// maker pushes and signs images as the cases want them.
type maker struct {
	t         *testing.T
	reg       *oci.Registry
	log       *requests
	host      string
	content   []byte // of the program in every image
	n         int
	ours, old *oci.Key
	theirs    *oci.Key
	sig, evil *oci.Sigstore
}

var (
	us   = oci.Identity{Email: "release@example.net", Issuer: "https://accounts.example.net"}
	them = oci.Identity{Email: "somebody@example.org", Issuer: "https://accounts.example.net"}
	fake = oci.Identity{Email: "release@example.net", Issuer: "https://accounts.example.org"}
)

func newMaker(t *testing.T, reg *oci.Registry, log *requests, host string, content []byte) *maker {
	t.Helper()
	m := &maker{t: t, reg: reg, log: log, host: host, content: content}
	for _, k := range []**oci.Key{&m.ours, &m.old, &m.theirs} {
		m.must(set(k, oci.NewKey))
	}
	for _, s := range []**oci.Sigstore{&m.sig, &m.evil} {
		m.must(set(s, oci.NewSigstore))
	}
	return m
}

func set[T any](to *T, from func() (T, error)) (err error) {
	*to, err = from()
	return err
}

func (m *maker) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// image makes one that no other case has.
func (m *maker) image() v1.Image {
	m.t.Helper()
	m.n++
	img, err := oci.Single("program", fmt.Append(slices.Clone(m.content), "\n", m.n))
	m.must(err)
	return img
}

func (m *maker) push() name.Digest {
	m.t.Helper()
	d, err := m.reg.Push(m.t.Context(), "net/runtime", m.image())
	m.must(err)
	return d
}

func (m *maker) sign(d name.Digest, k *oci.Key) name.Digest {
	m.t.Helper()
	m.must(m.reg.Sign(m.t.Context(), d, k))
	return d
}

func (m *maker) signAs(d, other name.Digest) name.Digest {
	m.t.Helper()
	m.must(m.reg.SignAs(m.t.Context(), d, other, m.ours))
	return d
}

func (m *maker) bundle(d name.Digest, k *oci.Key) name.Digest {
	m.t.Helper()
	m.must(m.reg.SignBundle(m.t.Context(), d, k))
	return d
}

func (m *maker) keyless(d, other name.Digest, s *oci.Sigstore, who oci.Identity, at time.Time) name.Digest {
	m.t.Helper()
	m.must(m.reg.SignKeyless(m.t.Context(), d, other, s, who, at))
	return d
}

func (m *maker) keylessBundle(d name.Digest, s *oci.Sigstore, who oci.Identity, at time.Time) name.Digest {
	m.t.Helper()
	m.must(m.reg.SignBundleKeyless(m.t.Context(), d, s, who, at))
	return d
}

// document is a manifest of any kind.
type document struct {
	raw  []byte
	kind types.MediaType
}

func (d document) RawManifest() ([]byte, error)        { return d.raw, nil }
func (d document) MediaType() (types.MediaType, error) { return d.kind, nil }
func (m *maker) repo() name.Repository {
	r, err := name.NewRepository(m.host + "/net/runtime")
	m.must(err)
	return r
}

// put pushes a manifest as it is.
func (m *maker) put(raw []byte, kind types.MediaType) name.Digest {
	m.t.Helper()
	d := m.repo().Digest(digest.Of(raw).String())
	m.must(remote.Put(d, document{raw, kind}, m.reg.Options(m.t.Context())...))
	return d
}

// manifest returns one of an image that is pushed.
func (m *maker) manifest() string {
	m.t.Helper()
	img := m.image()
	_, err := m.reg.Push(m.t.Context(), "net/runtime", img)
	m.must(err)
	raw, err := img.RawManifest()
	m.must(err)
	return string(raw)
}

// index pushes one with an image for this machine and one for another, and
// returns it with these two.
func (m *maker) index(platforms ...v1.Platform) (top name.Digest, parts []name.Digest) {
	m.t.Helper()
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range platforms {
		img := m.image()
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p}})
		d, err := img.Digest()
		m.must(err)
		parts = append(parts, m.repo().Digest(d.String()))
	}
	d, err := idx.Digest()
	m.must(err)
	top = m.repo().Digest(d.String())
	m.must(remote.WriteIndex(top, idx, m.reg.Options(m.t.Context())...))
	return top, parts
}

var here, elsewhere = v1.Platform{OS: "linux", Architecture: goarch}, v1.Platform{OS: "linux", Architecture: "s390x"}

// lockCase is an image and what has to become of it. Agent is what
// [image.Images.Ensure] says; Podman is what Podman alone says when it is asked
// for the image under the policy that Ensure has left. "" is trust.
type lockCase struct {
	name, expect  string
	make          func(m *maker) name.Digest
	trust         string   // whom the configuration trusts: key, both or keyless
	now           string   // and the newest one; "" for the same
	agent, podman []string // kinds of errors
}

var (
	unsigned   = []string{"unsigned"}
	wrongKey   = []string{"wrong key"}
	otherImage = []string{"other digest"}
	otherRepo  = []string{"identity"}
	expired    = []string{"expired"}
	revoked    = []string{"revoked"}
	manifests  = []string{"manifest"}
	refused    = []string{"refused"}
	secondLock = []string{"pull", "refused"}
	broken     = []string{"other"} // it does not come, and that is not the policy's doing
)

var lockCases = []lockCase{
	{"signed", "both locks open", func(m *maker) name.Digest { return m.sign(m.push(), m.ours) }, "key", "", nil, nil},
	{"signed-in-both-forms", "both locks open", func(m *maker) name.Digest { return m.bundle(m.sign(m.push(), m.ours), m.ours) }, "key", "", nil, nil},
	{"signed-by-many", "the right signature is found among others", func(m *maker) name.Digest {
		return m.sign(m.sign(m.signAs(m.sign(m.push(), m.theirs), m.repo().Digest(zero)), m.old), m.ours)
	}, "key", "", nil, nil},
	{"unsigned", "refused as unsigned", func(m *maker) name.Digest { return m.push() }, "key", "", unsigned, refused},
	{"other-key", "refused: none of the network's keys", func(m *maker) name.Digest { return m.sign(m.push(), m.theirs) }, "key", "", wrongKey, refused},
	{"other-key-bundle", "refused: none of the network's keys", func(m *maker) name.Digest { return m.bundle(m.push(), m.theirs) }, "key", "", wrongKey, refused},
	{"other-digest", "refused: the signature is of another image", func(m *maker) name.Digest { return m.signAs(m.push(), m.push()) }, "key", "", otherImage, refused},
	{"other-repository", "refused: the signature is for another repository", func(m *maker) name.Digest {
		d := m.push()
		return m.signAs(d, d.Registry.Repo("net/elsewhere").Digest(d.DigestStr()))
	}, "key", "", otherRepo, refused},
	{"other-registry", "refused: the signature is for another repository", func(m *maker) name.Digest {
		d := m.push()
		o, err := name.NewDigest("registry.test/net/runtime@" + d.DigestStr())
		m.must(err)
		return m.signAs(d, o)
	}, "key", "", otherRepo, refused},
	{"bundle-alone", "the agent's lock opens, Podman's cannot", func(m *maker) name.Digest { return m.bundle(m.push(), m.ours) }, "key", "", secondLock, refused},
	{"tag-moved", "the tag means nothing: what the digest names comes", func(m *maker) name.Digest {
		d, evil := m.sign(m.push(), m.ours), m.image()
		m.must(remote.Write(d.Tag("latest"), evil, m.reg.Options(m.t.Context())...))
		return d
	}, "key", "", nil, nil},
	{"other-bytes", "refused: the registry answers something else", func(m *maker) name.Digest {
		d := m.sign(m.push(), m.ours)
		m.log.lie(d.DigestStr(), types.OCIManifestSchema1, []byte(m.manifest()))
		return d
	}, "key", "", []string{"other bytes"}, broken},
	{"revoked-key", "refused: the key was taken back", func(m *maker) name.Digest { return m.sign(m.push(), m.old) }, "both", "key", revoked, refused},
	{"revoked-key-bundle", "refused: the key was taken back", func(m *maker) name.Digest { return m.bundle(m.push(), m.old) }, "both", "key", revoked, refused},
	{"revoked-and-signed-again", "another key vouches for it", func(m *maker) name.Digest { return m.sign(m.sign(m.push(), m.old), m.ours) }, "both", "key", nil, nil},

	{"keyless", "both locks open", func(m *maker) name.Digest {
		d := m.push()
		return m.keyless(d, d, m.sig, us, oci.Soon())
	}, "keyless", "", nil, nil},
	{"keyless-in-both-forms", "both locks open", func(m *maker) name.Digest {
		d := m.push()
		return m.keylessBundle(m.keyless(d, d, m.sig, us, oci.Soon()), m.sig, us, oci.Soon())
	}, "keyless", "", nil, nil},
	{"keyless-bundle-alone", "the agent's lock opens, Podman's cannot", func(m *maker) name.Digest {
		return m.keylessBundle(m.push(), m.sig, us, oci.Soon())
	}, "keyless", "", secondLock, refused},
	{"keyless-other-subject", "refused: not the network's identity", func(m *maker) name.Digest {
		d := m.push()
		return m.keyless(d, d, m.sig, them, oci.Soon())
	}, "keyless", "", wrongKey, refused},
	{"keyless-other-subject-bundle", "refused: not the network's identity", func(m *maker) name.Digest {
		return m.keylessBundle(m.push(), m.sig, them, oci.Soon())
	}, "keyless", "", wrongKey, refused},
	{"keyless-other-issuer", "refused: somebody else has vouched", func(m *maker) name.Digest {
		d := m.push()
		return m.keyless(d, d, m.sig, fake, oci.Soon())
	}, "keyless", "", wrongKey, refused},
	{"keyless-other-authority", "refused: an authority and a log of somebody else", func(m *maker) name.Digest {
		d := m.push()
		return m.keyless(d, d, m.evil, us, oci.Soon())
	}, "keyless", "", wrongKey, refused},
	{"keyless-other-authority-bundle", "refused: an authority and a log of somebody else", func(m *maker) name.Digest {
		return m.keylessBundle(m.push(), m.evil, us, oci.Soon())
	}, "keyless", "", wrongKey, refused},
	{"keyless-expired", "refused: the log saw it after the certificate's time", func(m *maker) name.Digest {
		d := m.push()
		return m.keyless(d, d, m.sig, us, time.Now().Add(30*time.Minute))
	}, "keyless", "", expired, refused},
	{"keyless-expired-bundle", "refused: the log saw it after the certificate's time", func(m *maker) name.Digest {
		return m.keylessBundle(m.push(), m.sig, us, time.Now().Add(30*time.Minute))
	}, "keyless", "", expired, refused},
	{"keyless-other-digest", "refused: the signature is of another image", func(m *maker) name.Digest {
		return m.keyless(m.push(), m.push(), m.sig, us, oci.Soon())
	}, "keyless", "", otherImage, refused},
	{"keyless-other-repository", "refused: the signature is for another repository", func(m *maker) name.Digest {
		d := m.push()
		return m.keyless(d, d.Registry.Repo("net/elsewhere").Digest(d.DigestStr()), m.sig, us, oci.Soon())
	}, "keyless", "", otherRepo, refused},
	{"keyless-wanted-key-given", "refused: a key is no identity", func(m *maker) name.Digest { return m.sign(m.push(), m.ours) }, "keyless", "", wrongKey, refused},
	{"key-wanted-keyless-given", "refused: an identity is no key", func(m *maker) name.Digest {
		d := m.push()
		return m.keyless(d, d, m.sig, us, oci.Soon())
	}, "key", "", wrongKey, refused},
	{"keyless-taken-back", "refused: the network trusts the identity no more", func(m *maker) name.Digest {
		d := m.push()
		return m.keyless(d, d, m.sig, us, oci.Soon())
	}, "keyless", "key", revoked, refused},

	{"index-and-images-signed", "both locks open", func(m *maker) name.Digest {
		top, parts := m.index(elsewhere, here)
		m.sign(parts[0], m.ours)
		m.sign(parts[1], m.ours)
		return m.sign(top, m.ours)
	}, "key", "", nil, nil},
	{"index-alone-signed", "the agent's lock opens; Podman asks for a signature of the image", func(m *maker) name.Digest {
		top, _ := m.index(elsewhere, here)
		return m.sign(top, m.ours)
	}, "key", "", secondLock, refused},
	{"index-image-for-here-unsigned", "the agent's lock opens; Podman asks for a signature of the image for here", func(m *maker) name.Digest {
		top, parts := m.index(elsewhere, here)
		m.sign(parts[0], m.ours)
		return m.sign(top, m.ours)
	}, "key", "", secondLock, refused},
	{"index-unsigned", "refused: whoever composed it has not signed; Podman does not ask", func(m *maker) name.Digest {
		top, parts := m.index(elsewhere, here)
		m.sign(parts[1], m.ours)
		return top
	}, "key", "", unsigned, nil},
	{"index-without-platform", "refused: nothing in it for this machine", func(m *maker) name.Digest {
		top, _ := m.index(elsewhere)
		return m.sign(top, m.ours)
	}, "key", "", []string{"platform"}, broken},
	{"index-in-index", "refused: an index is no image", func(m *maker) name.Digest {
		inner, _ := m.index(here)
		raw, err := remote.Get(inner, m.reg.Options(m.t.Context())...)
		m.must(err)
		m.sign(inner, m.ours)
		return m.sign(m.put(fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"platform":{"os":"linux","architecture":%q}}]}`,
			types.OCIImageIndex, types.OCIImageIndex, inner.DigestStr(), len(raw.Manifest), goarch), types.OCIImageIndex), m.ours)
	}, "key", "", manifests, broken},
	{"image-and-index-at-once", "refused: it can be read in two ways", func(m *maker) name.Digest {
		return m.sign(m.put([]byte(strings.Replace(m.manifest(), "{", `{"manifests":[],`, 1)), types.OCIManifestSchema1), m.ours)
	}, "key", "", manifests, broken},
	{"index-and-image-at-once", "refused: it can be read in two ways", func(m *maker) name.Digest {
		top, parts := m.index(elsewhere, here)
		m.sign(parts[1], m.ours)
		raw, err := remote.Get(top, m.reg.Options(m.t.Context())...)
		m.must(err)
		return m.sign(m.put(bytes.Replace(raw.Manifest, []byte("{"), []byte(`{"layers":[],`), 1), types.OCIImageIndex), m.ours)
	}, "key", "", manifests, broken},
	{"called-an-index", "refused: the registry calls it something else than it does", func(m *maker) name.Digest {
		raw := []byte(m.manifest())
		d := m.sign(m.repo().Digest(digest.Of(raw).String()), m.ours)
		m.log.lie(d.DigestStr(), types.OCIImageIndex, raw)
		return d
	}, "key", "", manifests, broken},
	{"schema-1", "refused: nobody can say what such a manifest names", func(m *maker) name.Digest {
		raw := fmt.Appendf(nil, `{"schemaVersion":1,"name":"net/runtime","tag":"%d","architecture":%q,"fsLayers":[],"history":[]}`, m.n, goarch)
		d := m.sign(m.put(raw, types.OCIManifestSchema1), m.ours) // cosign knows no other kind
		m.log.lie(d.DigestStr(), types.DockerManifestSchema1, raw)
		return d
	}, "key", "", manifests, broken},
}

const zero = "sha256:0000000000000000000000000000000000000000000000000000000000000000"

// whom returns the image trust of a name.
func (m *maker) whom(who string) *snapshot.ImageTrust {
	m.t.Helper()
	key := func(k *oci.Key) string {
		pem, err := k.PublicPEM()
		m.must(err)
		return string(pem)
	}
	switch who {
	case "key":
		return &snapshot.ImageTrust{Keys: []string{key(m.ours)}, Revoked: []string{key(m.old)}}
	case "both":
		return &snapshot.ImageTrust{Keys: []string{key(m.old), key(m.ours)}}
	case "keyless":
		text, err := m.sig.TrustedRoot()
		m.must(err)
		return &snapshot.ImageTrust{Keyless: &snapshot.Keyless{Email: us.Email, Issuer: us.Issuer, TrustedRoot: text}}
	}
	m.t.Fatalf("nobody is called %q", who)
	return nil
}

// locks shows an image to the agent's lock, and then to Podman's alone.
type locks func(ref snapshot.ImageRef, own, now *snapshot.ImageTrust) (agent, podman error)

func kindsOf(err error) (out []string) {
	for k, e := range kinds {
		if errors.Is(err, e) {
			out = append(out, strings.TrimSuffix(k, " by its code"))
		}
	}
	if err != nil && out == nil {
		out = []string{"other"}
	}
	slices.Sort(out)
	return out
}

func same(got error, want []string) bool { return slices.Equal(kindsOf(got), want) }

// try shows a case to both locks.
func (c *lockCase) try(t *testing.T, m *maker, l locks) {
	m.t = t
	defer m.log.honest()
	ref, err := snapshot.ParseImageRef(c.make(m).String())
	if err != nil {
		t.Fatal(err)
	}
	own := m.whom(c.trust)
	now := own
	if c.now != "" {
		now = m.whom(c.now)
	}
	before := m.log.layers()
	agent, podman := l(ref, own, now)
	t.Logf("expected: %s; got: agent: %v; Podman: %v", c.expect, agent, podman)
	if !same(agent, c.agent) {
		t.Errorf("agent: %v, want %q: %s", agent, c.agent, c.expect)
	}
	if !same(podman, c.podman) {
		t.Errorf("Podman: %v, want %q: %s", podman, c.podman, c.expect)
	}
	if c.agent != nil && c.podman != nil && m.log.layers() != before {
		t.Errorf("a layer was fetched: %s", c.expect)
	}
}

// TestLocks shows every case to the agent's lock and to Podman's code.
func TestLocks(t *testing.T) {
	log := &requests{}
	addr, ca := log.serve(t, netip.MustParseAddr("127.0.0.1"))
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	reg := oci.NewRegistry(addr, pool)
	t.Cleanup(reg.Close)
	m := newMaker(t, reg, log, addr, nil)
	for _, c := range lockCases {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "containers")
			tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
			t.Cleanup(tr.CloseIdleConnections)
			pod := image.NewStandIn(t, dir)
			i, err := image.New(tr, pod, dir, ca, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			c.try(t, m, func(ref snapshot.ImageRef, own, now *snapshot.ImageTrust) (agent, podman error) {
				pod.StoresIndex(ref)
				agent = i.Ensure(t.Context(), ref, own, now)
				if slices.Equal(c.podman, broken) {
					return agent, errors.New("that is for a whole Podman to say")
				}
				return agent, pod.Pull(t.Context(), ref, io.Discard)
			})
		})
	}
}
