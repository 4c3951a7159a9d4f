// Package image owns the trust in images: an image is used only if somebody whom
// the network trusts has signed exactly this digest for exactly this repository.
//
// The rule it keeps: there are two locks, and neither relies on the other. The
// first is here, cosign's own code on the signatures in the registry, before
// anything is pulled. The second is Podman's policy, which this package writes
// from the same image trust and which Podman applies when it pulls. Whatever is not
// named by the policy is rejected.
//
// The policy is that of an API service of the agent's own, whose home is
// private, so the user's own Podman keeps the policy that it has.
package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

// Why an image is not used. Waiting does not mend these; the publisher, who
// reads them in the node's report, can.
var (
	// ErrUnsigned says that the registry has no signature of the image.
	ErrUnsigned = errors.New("image is not signed: sign it with cosign sign --key KEY --tlog-upload=false REPOSITORY@DIGEST")
	// ErrWrongKey says that there are signatures, but of nobody whom the
	// configuration names.
	ErrWrongKey = errors.New("image is signed by none of the network's keys: have somebody of image_trust sign it, or publish a configuration that names who did")
	// ErrExpired says that a log saw a keyless signature when its certificate was
	// not good, or not any more.
	ErrExpired = errors.New("certificate was not good when the log saw the signature: sign the image again")
	// ErrRevoked says that the image is signed by somebody whom the network's
	// newest configuration does not trust any more, and by nobody else.
	ErrRevoked = errors.New("image is signed by a key that the network has taken back: sign it with one of image_trust")
	// ErrOtherDigest says that somebody who is trusted has signed, but something
	// else, whose signature was put beside this image.
	ErrOtherDigest = errors.New("signature is of another image: sign this digest")
	// ErrIdentity says that somebody who is trusted has signed this image, but for
	// another repository.
	ErrIdentity = errors.New("signature is for another repository: sign the image where the configuration has it")
	// ErrOtherBytes says that the registry has other bytes under the digest.
	ErrOtherBytes = errors.New("registry answers other bytes than the digest names: push the image again, or look at who answers")
	// ErrManifest says that what is signed is not an image that can be run, or
	// could be read in two ways.
	ErrManifest = errors.New("manifest cannot be used: push the image as one of OCI, or of Docker's schema 2")
	// ErrPlatform says that an index has no image for this machine.
	ErrPlatform = errors.New("index has no image for this machine's platform")
	// ErrTooLarge says that the registry sent more than any image has beside it.
	ErrTooLarge = errors.New("registry sent more about the image than is read: remove what lies beside it")
	// ErrAltered says that the stored image is not what was pulled.
	ErrAltered = errors.New("stored image was altered since it was pulled")
	// ErrOtherImage says that Podman has for an index another image than the one
	// that it names for this machine.
	ErrOtherImage = errors.New("another image is stored than the index names for this machine")
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
	// Has reports whether exactly ref is stored. It fails where Podman does not say.
	Has(ctx context.Context, ref snapshot.ImageRef) (bool, error)
	// RemoveImages removes those in pulled that are not in keep, and returns
	// what is gone afterwards, also with an error.
	RemoveImages(ctx context.Context, pulled, keep []snapshot.ImageRef) (gone []snapshot.ImageRef, err error)
	// Damage reads all that is stored, and says how ref differs from what was
	// pulled; nil for not at all.
	Damage(ctx context.Context, ref snapshot.ImageRef) ([]string, error)
}

// The talk with a registry about signatures ends when it stands still, and at a
// time in which any line brings something so small.
const (
	stallTimeout = 30 * time.Second
	checkTimeout = 15 * time.Minute
)

// Images is the trusted way to images. Its methods may be called concurrently.
// Those that bring or remove images of one repository wait for each other; no other
// repository's registry is waited for.
type Images struct {
	podman    podman
	transport http.RoundTripper
	dir       string
	ca        []byte
	log       *slog.Logger
	stall     time.Duration
	reading   chan struct{} // one place, for who has Podman read its store

	mu   sync.Mutex               // guards what follows, and writing the files in dir; held for no longer than those take to write
	busy map[string]chan struct{} // repositories that somebody works on, until the channel is closed
	open map[string]*requirements // those that the policy names

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
	i := &Images{
		podman: p, transport: transport, dir: policyDir, ca: ca, log: log, stall: stallTimeout,
		reading: make(chan struct{}, 1), busy: map[string]chan struct{}{}, open: map[string]*requirements{},
	}
	// Without a file here Podman would use the machine's policy, which lets
	// everything in. It reads the files anew for each pull.
	if err := i.deny(); err != nil {
		return nil, fmt.Errorf("image policy: %w", err)
	}
	return i, nil
}

// Ensure makes sure that ref is in Podman's store and may be used: signed by
// somebody whom own trusts, the configuration that asks for it, and whom now, the
// newest one, trusts still; and stored with this very digest. Podman's policy
// names ref's repository afterwards, and beside it only those of other calls that
// are under way.
//
// Where ref is an index, its signature vouches for the image of this platform,
// which is noted, and has to be the stored one. Podman looks for a signature of
// that image, and for none of the index.
//
// A signature that was found is kept, and checked again at each call. So
// without the registry a stored image goes on as long as the keys do. An image
// that is not trusted is one of the errors above; anything else may pass.
func (i *Images) Ensure(ctx context.Context, ref snapshot.ImageRef, own, now *snapshot.ImageTrust) error {
	t, still, err := under(own, now)
	if err != nil {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	done, err := i.turn(ctx, ref)
	if err != nil {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	defer done()
	if err := i.allow(ref, still); err != nil {
		return fmt.Errorf("image %s: policy: %w", ref, err)
	}
	rec, known := i.record(ref)
	if known && rec.judge(ctx, t) == nil && i.stored(ctx, ref, rec.Manifest) == nil {
		return nil
	}

	sig, manifest, err := i.find(ctx, ref, t)
	if err != nil {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	rec.add(sig)
	rec.Manifest = manifest
	if !known || rec.Foreign {
		// An image that somebody had here before is not ours to remove. Once he
		// has removed it himself, it is ours that takes its place.
		if rec.Foreign, err = i.podman.Has(ctx, ref); err != nil {
			return fmt.Errorf("image %s: %w", ref, err)
		}
	}
	if err := i.keep(ref, rec); err != nil {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	i.log.InfoContext(ctx, "image is trusted, pulling", "image", ref.String(), "manifest", manifest)
	if err := i.podman.Pull(ctx, ref, nil); err != nil {
		switch {
		case ctx.Err() != nil:
		case sig.Bundle != nil:
			err = fmt.Errorf("%w (it is signed only in cosign's new bundle format, which Podman 5 cannot read; sign it with cosign sign --new-bundle-format=false, too)", err)
		case manifest != ref.Digest():
			err = fmt.Errorf("%w (it is an index, of which Podman wants each image signed, too: cosign sign --recursive)", err)
		}
		return fmt.Errorf("image %s: %w: %w", ref, ErrPull, err)
	}
	if err := i.stored(ctx, ref, manifest); err != nil {
		return fmt.Errorf("image %s: %w: not stored as it was asked for: %w", ref, ErrPull, err)
	}
	return nil
}

// stored fails unless ref is stored, with this manifest.
func (i *Images) stored(ctx context.Context, ref snapshot.ImageRef, manifest digest.Digest) error {
	id, _, err := i.podman.Image(ctx, ref)
	if err != nil || manifest == ref.Digest() {
		return err
	}
	chosen, _, err := i.podman.Image(ctx, ref.At(manifest))
	if err == nil && chosen != id {
		err = fmt.Errorf("%w: %s is %s, and its manifest %s is %s", ErrOtherImage, ref, id, manifest, chosen)
	}
	return err
}

// turn waits until nobody else works on ref's repository.
func (i *Images) turn(ctx context.Context, ref snapshot.ImageRef) (done func(), err error) {
	for {
		done, wait, err := i.tryTurn(ref)
		if err != nil || wait == nil {
			return done, err
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// tryTurn is [Images.turn] for who does not wait: it returns what is closed when it
// may be tried again, where somebody else has the turn.
func (i *Images) tryTurn(ref snapshot.ImageRef) (done func(), wait <-chan struct{}, err error) {
	named, err := repository(ref)
	if err != nil {
		return nil, nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if c := i.busy[named.Name()]; c != nil {
		return nil, c, nil
	}
	c := make(chan struct{})
	i.busy[named.Name()] = c
	return func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		delete(i.busy, named.Name())
		close(c)
	}, nil, nil
}

// Manifest returns what ref came to on this machine: its own digest, or that of
// the image for this platform if ref is an index.
func (i *Images) Manifest(ref snapshot.ImageRef) digest.Digest {
	if rec, known := i.record(ref); known {
		return rec.Manifest
	}
	return ref.Digest()
}

// Trusted fails with [ErrRevoked] if somebody has signed ref who counted for the
// configuration that brought it, and does not count now. It asks nobody, and is
// nil where nothing is known of the image.
func (i *Images) Trusted(ctx context.Context, ref snapshot.ImageRef, own, now *snapshot.ImageTrust) error {
	rec, known := i.record(ref)
	if !known {
		return nil
	}
	t, _, err := under(own, now)
	if err == nil {
		err = rec.judge(ctx, t)
	}
	if errors.Is(err, ErrRevoked) {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	return nil
}

// Verify compares every byte and every name of the stored image with what was
// pulled: [ErrAltered] where one differs. An image that Ensure has brought is removed
// then, so that the next Ensure fetches it again. One that somebody had here before is
// his to remove. Other errors say that it could not be read.
//
// Podman does that, for the whole of its store and at the disk's speed: 800 MB
// took 2 to 4 s. It is not for each start of a runtime, and meanwhile Podman begins
// nothing else; what is asked of Images goes on, as far as it needs no more of Podman
// than a look. What it compares with lies in the same store, so that it finds
// a bad disk, a lost write, and whoever did not know that, but not whoever could
// change the agent as well.
func (i *Images) Verify(ctx context.Context, ref snapshot.ImageRef) error {
	select {
	case i.reading <- struct{}{}:
		defer func() { <-i.reading }()
	case <-ctx.Done():
		return fmt.Errorf("image %s: %w", ref, context.Cause(ctx))
	}
	damage, err := i.podman.Damage(ctx, ref)
	if err != nil {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	if len(damage) == 0 {
		return nil
	}
	err = fmt.Errorf("image %s: %w: %s", ref, ErrAltered, strings.Join(damage[:min(len(damage), 5)], "; "))
	done, turnErr := i.turn(ctx, ref)
	if turnErr != nil {
		return errors.Join(err, turnErr)
	}
	defer done()
	if rec, known := i.record(ref); !known || rec.Foreign {
		return fmt.Errorf("%w (it was here before this agent, which does not remove it: podman system check --repair does, or podman image rm --force, by the account that the agent runs as)", err)
	}
	if _, removeErr := i.podman.RemoveImages(ctx, []snapshot.ImageRef{ref}, nil); removeErr != nil {
		err = errors.Join(err, fmt.Errorf("and it was not removed: podman system check --repair does it: %w", removeErr))
	}
	return err
}

// Retain removes the images that Ensure has brought and that are not in keep.
// Images of the machine's user are never touched. It waits for nobody: where an
// image of the same repository is being brought, the error says so.
func (i *Images) Retain(ctx context.Context, keep ...snapshot.ImageRef) error {
	wanted := map[snapshot.ImageRef]bool{}
	for _, ref := range keep {
		wanted[ref] = true
	}
	recs, err := i.allRecords()
	if err != nil {
		return fmt.Errorf("images: %w", err)
	}
	var pulled []snapshot.ImageRef
	turns := map[string]bool{} // that this call has
	for _, rec := range recs {
		if wanted[rec.Image] {
			continue
		}
		if !turns[rec.Image.Repository()] {
			done, wait, turnErr := i.tryTurn(rec.Image)
			if turnErr == nil && wait != nil {
				turnErr = errors.New("one of its repository is being brought")
			}
			if turnErr != nil {
				err = errors.Join(err, fmt.Errorf("%s not removed: %w", rec.Image, turnErr))
				continue
			}
			defer done() // after the removal
			turns[rec.Image.Repository()] = true
		}
		if rec.Foreign {
			err = errors.Join(err, i.forget(rec.Image))
			continue
		}
		pulled = append(pulled, rec.Image)
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
