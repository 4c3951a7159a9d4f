// Package image owns the trust in images: an image is used only if the
// network's keys have signed exactly this digest for exactly this repository.
//
// The rule it keeps: there are two locks, and neither relies on the other. The
// first is here, cosign's own code on the signatures in the registry, before
// anything is pulled. The second is Podman's policy, which this package writes
// from the same keys and which Podman applies when it pulls. Whatever is not
// named by the policy is rejected.
//
// The policy is that of an API service of the agent's own, whose home is
// private, so the user's own Podman keeps the policy that it has.
package image

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/resultity/node/internal/snapshot"
)

// Why an image is not trusted. Waiting does not mend these; the publisher, who
// reads them in the node's report, can.
var (
	// ErrUnsigned says that the registry has no signature of the image.
	ErrUnsigned = errors.New("image is not signed: sign it with cosign sign --key KEY --tlog-upload=false REPOSITORY@DIGEST")
	// ErrWrongKey says that there are signatures, but none that one of the
	// configuration's keys has made.
	ErrWrongKey = errors.New("image is signed by none of the network's keys: sign it with one of image_keys, or publish a configuration that lists the key")
	// ErrOtherDigest says that a key of the network has signed, but something
	// else, whose signature was put beside this image.
	ErrOtherDigest = errors.New("signature is of another image: sign this digest")
	// ErrIdentity says that a key of the network has signed this image, but for
	// another repository.
	ErrIdentity = errors.New("signature is for another repository: sign the image where the configuration has it")
	// ErrKeys says that a key of the configuration is none.
	ErrKeys = errors.New("image keys cannot be used")
)

// ErrPull says that the image is trusted, but Podman did not bring it. The
// error wraps Podman's.
var ErrPull = errors.New("pulling the image failed")

// podman is the part of Podman's API that trust needs.
type podman interface {
	// Pull fetches ref under Podman's policy.
	Pull(ctx context.Context, ref snapshot.ImageRef, progress io.Writer) error
	// Image fails unless exactly ref is stored.
	Image(ctx context.Context, ref snapshot.ImageRef) (id string, size int64, err error)
	// RemoveImages removes those in pulled that are not in keep, and returns
	// what is gone afterwards, also with an error.
	RemoveImages(ctx context.Context, pulled, keep []snapshot.ImageRef) (gone []snapshot.ImageRef, err error)
}

// The talk with a registry about signatures ends when it stands still, and at a
// time in which any line brings something so small.
const (
	stallTimeout = 30 * time.Second
	checkTimeout = 15 * time.Minute
)

// Images is the trusted way to images. Its methods may be called concurrently,
// but do their work one after the other.
type Images struct {
	podman    podman
	transport http.RoundTripper
	dir       string
	ca        []byte
	log       *slog.Logger
	stall     time.Duration

	mu sync.Mutex // held for a whole call: guards the files in dir

	policyMu sync.Mutex // guards policy, also over the file; never held over anything else
	policy   []byte     // what the policy's file has to be; nil before it was written
}

// New returns the images of p. Registries are asked through transport for
// signatures; nil is Go's default transport. PolicyDir is the directory .config/containers in the home of the
// API service behind p; nothing else may write there. If the registry's
// certificate leads to a private authority, ca is that authority in PEM, and
// transport must trust it, too.
func New(transport http.RoundTripper, p podman, policyDir string, ca []byte, log *slog.Logger) (*Images, error) {
	if err := os.MkdirAll(filepath.Join(policyDir, records), 0o700); err != nil {
		return nil, fmt.Errorf("image policy: %w", err)
	}
	if transport == nil {
		transport = http.DefaultTransport
	}
	i := &Images{podman: p, transport: transport, dir: policyDir, ca: ca, log: log, stall: stallTimeout}
	// Without a file here Podman would use the machine's policy, which lets
	// everything in. It reads the files anew for each pull.
	if err := i.deny(); err != nil {
		return nil, fmt.Errorf("image policy: %w", err)
	}
	return i, nil
}

// Ensure makes sure that ref is in Podman's store and may be used: signed by
// one of keys, in PEM, and stored with this very digest. Podman's policy names
// ref's repository afterwards and nothing else.
//
// The signature that was found is kept, and checked again at each call. So
// without the registry a stored image goes on as long as the keys do. An image
// that is not trusted is one of the errors above; anything else may pass.
func (i *Images) Ensure(ctx context.Context, ref snapshot.ImageRef, keys []string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	ks, err := load(keys)
	if err != nil {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	if err := i.allow(ref, keys); err != nil {
		return fmt.Errorf("image %s: policy: %w", ref, err)
	}
	rec, known := i.record(ref)
	if known && rec.check(ctx, ref, ks) == nil {
		if _, _, err := i.podman.Image(ctx, ref); err == nil {
			return nil
		}
	}

	sig, err := i.find(ctx, ref, ks)
	if err != nil {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	rec.Payload, rec.Signature, rec.Bundle = sig.Payload, sig.Signature, sig.Bundle
	if !known {
		// An image that somebody had here before is not ours to remove.
		_, _, err := i.podman.Image(ctx, ref)
		rec.Foreign = err == nil
	}
	if err := i.keep(ref, rec); err != nil {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	i.log.InfoContext(ctx, "image is trusted, pulling", "image", ref.String())
	if err := i.podman.Pull(ctx, ref, nil); err != nil {
		if rec.Bundle != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w (it is signed only in cosign's new bundle format, which Podman 5 cannot read; sign it with cosign sign --new-bundle-format=false, too)", err)
		}
		return fmt.Errorf("image %s: %w: %w", ref, ErrPull, err)
	}
	if _, _, err := i.podman.Image(ctx, ref); err != nil {
		return fmt.Errorf("image %s: %w: not stored as it was asked for: %w", ref, ErrPull, err)
	}
	return nil
}

// Retain removes the images that Ensure has brought and that are not in keep.
// Images of the machine's user are never touched.
func (i *Images) Retain(ctx context.Context, keep ...snapshot.ImageRef) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	wanted := map[snapshot.ImageRef]bool{}
	for _, ref := range keep {
		wanted[ref] = true
	}
	recs, err := i.allRecords()
	if err != nil {
		return fmt.Errorf("images: %w", err)
	}
	var pulled []snapshot.ImageRef
	for _, rec := range recs {
		switch {
		case wanted[rec.Image]:
		case rec.Foreign:
			err = errors.Join(err, i.forget(rec.Image))
		default:
			pulled = append(pulled, rec.Image)
		}
	}
	if len(pulled) == 0 {
		return err
	}
	gone, removeErr := i.podman.RemoveImages(ctx, pulled, keep)
	err = errors.Join(err, removeErr)
	for _, ref := range gone {
		i.log.InfoContext(ctx, "removed an image that the configuration does not name", "image", ref.String())
		err = errors.Join(err, i.forget(ref))
	}
	if err != nil {
		return fmt.Errorf("images: %w", err)
	}
	return nil
}

// load makes verifiers of keys in PEM.
func load(keys []string) ([]signature.Verifier, error) {
	if len(keys) == 0 {
		return nil, fmt.Errorf("%w: there are none", ErrKeys)
	}
	vs := make([]signature.Verifier, len(keys))
	for n, k := range keys {
		pub, err := cryptoutils.UnmarshalPEMToPublicKey([]byte(k))
		if err != nil {
			return nil, fmt.Errorf("%w: key %d: %w", ErrKeys, n, err)
		}
		if vs[n], err = signature.LoadVerifier(pub, crypto.SHA256); err != nil {
			return nil, fmt.Errorf("%w: key %d: %w", ErrKeys, n, err)
		}
	}
	return vs, nil
}
