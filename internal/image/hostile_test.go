package image_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/test/oci"
)

// resign changes the manifest that lists an image's classic signatures.
func (m *maker) resign(d name.Digest, change func(layers []any) []any) name.Digest {
	m.t.Helper()
	tag := d.Tag(strings.Replace(d.DigestStr(), ":", "-", 1) + ".sig")
	old, err := remote.Get(tag, m.reg.Options(m.t.Context())...)
	m.must(err)
	var doc map[string]any
	m.must(json.Unmarshal(old.Manifest, &doc))
	doc["layers"] = change(doc["layers"].([]any))
	raw, err := json.Marshal(doc)
	m.must(err)
	m.must(remote.Put(tag, document{raw, old.MediaType}, m.reg.Options(m.t.Context())...))
	return d
}

// annotate sets an annotation of the last signature.
func annotate(key, value string) func([]any) []any {
	return func(layers []any) []any {
		last := layers[len(layers)-1].(map[string]any)
		last["annotations"].(map[string]any)[key] = value
		return layers
	}
}

// TestHostileSignatures has whoever may write to a registry put beside an image
// what no signer would.
func TestHostileSignatures(t *testing.T) {
	const promise, certificate = "dev.sigstore.cosign/bundle", "dev.sigstore.cosign/certificate"
	const garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
	log := &requests{}
	addr, ca := log.serve(t, netip.MustParseAddr("127.0.0.1"))
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	reg := oci.NewRegistry(addr, pool)
	t.Cleanup(reg.Close)
	m := newMaker(t, reg, log, addr, nil)
	keyless := func(m *maker) name.Digest {
		d := m.push()
		return m.keyless(d, d, m.sig, us, oci.Soon())
	}
	for _, c := range []struct {
		name, expect string
		make         func(m *maker) name.Digest
		trust        string
		kinds        []string
	}{
		{"a-hundred-signatures", "the right one is found among the first hundred", func(m *maker) name.Digest {
			return m.resign(m.sign(m.sign(m.push(), m.theirs), m.ours), func(l []any) []any { return append(slices.Repeat(l[:1], 99), l[1]) })
		}, "key", nil},
		{"too-many-signatures", "what comes after a hundred is not looked at", func(m *maker) name.Digest {
			return m.resign(m.sign(m.sign(m.push(), m.theirs), m.ours), func(l []any) []any { return append(slices.Repeat(l[:1], 100), l[1]) })
		}, "key", wrongKey},
		{"huge-manifest", "nothing of more than 4 MiB is read", func(m *maker) name.Digest {
			raw := []byte(m.manifest())
			d := m.sign(m.put(raw, types.OCIManifestSchema1), m.ours)
			m.log.lie(d.DigestStr(), types.OCIManifestSchema1, append(raw, bytes.Repeat([]byte(" "), 5<<20)...))
			return d
		}, "key", []string{"too large"}},
		{"signature-list-is-huge", "nothing of more than 4 MiB is read", func(m *maker) name.Digest {
			d := m.sign(m.push(), m.ours)
			m.log.lie(strings.Replace(d.DigestStr(), ":", "-", 1)+".sig", types.OCIManifestSchema1, bytes.Repeat([]byte(" "), 5<<20))
			return d
		}, "key", []string{"too large"}},
		{"promise-of-another-type", "refused, and the agent lives: cosign alone would not", func(m *maker) name.Digest {
			return m.resign(keyless(m), annotate(promise, `{"SignedEntryTimestamp":"AAAA","Payload":{"body":1}}`))
		}, "keyless", wrongKey},
		{"promise-is-null", "refused, and the agent lives", func(m *maker) name.Digest { return m.resign(keyless(m), annotate(promise, `null`)) }, "keyless", wrongKey},
		{"promise-is-empty", "refused", func(m *maker) name.Digest { return m.resign(keyless(m), annotate(promise, `{}`)) }, "keyless", wrongKey},
		{"promise-is-huge", "refused: it is not read", func(m *maker) name.Digest {
			return m.resign(keyless(m), func(l []any) []any {
				notes := l[0].(map[string]any)["annotations"].(map[string]any)
				notes[promise] = notes[promise].(string) + strings.Repeat(" ", image.MaxPayload)
				return l
			})
		}, "keyless", wrongKey},
		{"promise-of-another-signature", "refused", func(m *maker) name.Digest {
			var other string
			m.resign(keyless(m), func(l []any) []any {
				other = l[0].(map[string]any)["annotations"].(map[string]any)[promise].(string)
				return l
			})
			return m.resign(keyless(m), annotate(promise, other))
		}, "keyless", wrongKey},
		{"certificate-is-none", "refused, and the agent lives", func(m *maker) name.Digest { return m.resign(keyless(m), annotate(certificate, "x")) }, "keyless", wrongKey},
		{"certificate-is-garbage", "refused, and the agent lives", func(m *maker) name.Digest { return m.resign(keyless(m), annotate(certificate, garbage)) }, "keyless", wrongKey},
		{"no-promise", "refused: no log has seen it", func(m *maker) name.Digest { return m.resign(keyless(m), annotate(promise, "")) }, "keyless", wrongKey},
	} {
		t.Run(c.name, func(t *testing.T) {
			m.t = t
			defer log.honest()
			ref, err := snapshot.ParseImageRef(c.make(m).String())
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
			t.Cleanup(tr.CloseIdleConnections)
			i, err := image.New(tr, image.NewStandIn(t, dir), dir, ca, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			trust := m.whom(c.trust)
			err = i.Ensure(t.Context(), ref, trust, trust)
			t.Logf("expected: %s; got: %v", c.expect, err)
			if !same(err, c.kinds) {
				t.Errorf("%v, want %q: %s", err, c.kinds, c.expect)
			}
		})
	}
}
