package snapshot

import (
	"errors"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/resultity/node/internal/digest"
)

// trusted returns metadata as it is after a whole chain was verified.
func trusted(files map[string]*metadata.TargetFiles) *trustedmetadata.TrustedMetadata {
	expires := time.Unix(1_900_000_000, 0).UTC()
	targets := metadata.Targets(expires)
	targets.Signed.Version = 7
	targets.Signed.Targets = files
	return &trustedmetadata.TrustedMetadata{
		Root:      metadata.Root(expires),
		Timestamp: metadata.Timestamp(expires),
		Snapshot:  metadata.Snapshot(expires),
		Targets:   map[string]*metadata.Metadata[metadata.TargetsType]{metadata.TARGETS: targets},
	}
}

func describe(t *testing.T, raw []byte, hashes ...string) *metadata.TargetFiles {
	t.Helper()
	info, err := metadata.TargetFile().FromBytes(Target, raw, hashes...)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func TestOpen(t *testing.T) {
	raw := golden(t)
	s, err := Open(trusted(map[string]*metadata.TargetFiles{Target: describe(t, raw, "sha256")}), raw)
	if err != nil {
		t.Fatal(err)
	}
	if s.Digest() != digest.Of(raw) || s.Version() != 7 || !s.Expires().Equal(time.Unix(1_900_000_000, 0)) {
		t.Errorf("digest %s, version %d, expires %v", s.Digest(), s.Version(), s.Expires())
	}
	if m := s.Model(); m != &s.Config().Models[0] {
		t.Errorf("model %+v", m)
	}
}

func TestOpenRefusesWhatIsNotNamed(t *testing.T) {
	raw := golden(t)
	info := func() *metadata.TargetFiles { return describe(t, raw, "sha256") }
	targets := func(f *metadata.TargetFiles) *trustedmetadata.TrustedMetadata {
		return trusted(map[string]*metadata.TargetFiles{Target: f})
	}
	noTimestamp, noTargets := targets(info()), targets(info())
	noTimestamp.Timestamp = nil
	delete(noTargets.Targets, metadata.TARGETS)
	longer := info()
	longer.Length++

	for name, tm := range map[string]*trustedmetadata.TrustedMetadata{
		"nothing":              nil,
		"no timestamp":         noTimestamp,
		"no targets":           noTargets,
		"no such target":       trusted(map[string]*metadata.TargetFiles{"other.json": info()}),
		"a null target":        targets(nil),
		"no hash":              targets(&metadata.TargetFiles{Length: int64(len(raw))}),
		"another kind of hash": targets(describe(t, raw, "sha512")),
		"another length":       targets(longer),
	} {
		if s, err := Open(tm, raw); s != nil || !errors.Is(err, ErrUntrusted) {
			t.Errorf("%s: got %v, %v, want ErrUntrusted", name, s, err)
		}
	}
	for i := range raw {
		raw[i] ^= 1
		if s, err := Open(targets(describe(t, golden(t), "sha256")), raw); s != nil || !errors.Is(err, ErrUntrusted) {
			t.Fatalf("byte %d flipped: got %v, %v, want ErrUntrusted", i, s, err)
		}
		raw[i] ^= 1
	}
}

// What the network has signed can still be unusable, and is told apart.
func TestOpenRefusesWhatIsUnusable(t *testing.T) {
	raw := edit(t, "tgi", "runtime", "engine")
	s, err := Open(trusted(map[string]*metadata.TargetFiles{Target: describe(t, raw, "sha256")}), raw)
	if s != nil || !errors.Is(err, ErrInvalid) || errors.Is(err, ErrUntrusted) {
		t.Errorf("got %v, %v, want ErrInvalid alone", s, err)
	}
}
