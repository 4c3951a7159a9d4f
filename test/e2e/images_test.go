package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/test/oci"
	"github.com/resultity/node/test/stack"
)

// mark returns a place in a node's journal.
func mark(ctx context.Context, t *testing.T, n *stack.Node) string {
	t.Helper()
	cursor, err := n.Cursor(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return cursor
}

// told waits until a node has logged an event after a place in its journal, and
// returns what it has logged, with the errors.
func told(ctx context.Context, t *testing.T, n *stack.Node, since string, e *journal.Event) string {
	t.Helper()
	records, err := n.WaitEvent(ctx, since, e)
	if err != nil {
		t.Fatalf("%v\n%s", err, n.Journal(context.WithoutCancel(ctx), 60))
	}
	var all []string
	for _, r := range records {
		all = append(all, r.Message)
	}
	return strings.Join(all, "\n")
}

// active waits until all nodes run an image and get jobs.
func active(ctx context.Context, t *testing.T, ref snapshot.ImageRef) {
	t.Helper()
	for _, n := range s.Nodes {
		if err := n.WaitStatus(ctx, "jobs with image "+ref.String(), func(st *control.Status) bool {
			return st.GetsJobs() && st.Runtime.Image == ref.Digest()
		}); err != nil {
			t.Fatalf("%v\n%s", err, n.Journal(context.WithoutCancel(ctx), 60))
		}
	}
}

// asAccount runs a script as the node's account.
func asAccount(ctx context.Context, t *testing.T, n *stack.Node, script string) {
	t.Helper()
	if out, err := n.OutputAs(ctx, stack.Account, "sh", "-ec", script); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// An index of several platforms is what the configuration names, what the node
// reports and what its receipts state; what runs is the image for this machine.
func TestIndexOfPlatforms(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	options := s.Reg.Options(ctx)
	at, err := name.NewDigest(s.Image.String())
	check(err)
	ours, err := remote.Image(at, options...)
	check(err)
	file, err := ours.ConfigFile()
	check(err)
	other, err := oci.Single("other", []byte("of another platform"))
	check(err)
	idx := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
		mutate.IndexAddendum{Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
		mutate.IndexAddendum{Add: ours, Descriptor: v1.Descriptor{Platform: file.Platform()}})
	d, err := idx.Digest()
	check(err)
	top := at.Digest(d.String())
	check(remote.WriteIndex(top, idx, options...))
	check(s.Reg.Sign(ctx, top, s.Key)) // the image is signed already
	ref, err := snapshot.ParseImageRef(top.String())
	check(err)

	check(s.Publish(ctx, func(c *snapshot.Config) { c.Runtime.Image = ref }))
	active(ctx, t, ref)
	check(s.Publish(ctx, func(c *snapshot.Config) { c.Runtime.Image = s.Image }))
	active(ctx, t, s.Image)
}

// A file of the stored image that is not what was pulled is found before the
// runtime starts, and the image is fetched again.
func TestImageAltered(t *testing.T) {
	eachNode(t, func(t *testing.T, n *stack.Node) {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		since := mark(ctx, t, n)
		asAccount(ctx, t, n, "systemctl --user stop resultity-agent.service "+stack.Runtime+`
			trap 'systemctl --user start resultity-agent.service' EXIT
			# Other images of the tests have a link there.
			f=$(find ~/.local/share/containers/storage/overlay/*/diff/usr/bin -name llama-server -type f)
			test -n "$f"
			for i in $f; do t=$(stat -c %y $i); printf X | dd of=$i conv=notrunc bs=1 seek=4096 status=none; touch -d "$t" $i; done`)
		why := told(ctx, t, n, since, journal.ImageAltered)
		t.Logf("expected: %s: file integrity checksum failed; got: %s", journal.ImageAltered.Name, strings.TrimSpace(why))
		if !strings.Contains(why, "file integrity checksum failed") {
			t.Errorf("not for what was done: %s", why)
		}
		active(ctx, t, s.Image)
	})
}

// When the network takes back the key that has signed what runs, every node stops
// it, and nothing brings it back but the trust, or somebody else's signature.
func TestKeyRevoked(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	k, err := oci.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	pem, err := k.PublicPEM()
	if err != nil {
		t.Fatal(err)
	}
	at, err := name.NewDigest(s.Image.String())
	if err != nil {
		t.Fatal(err)
	}
	var before snapshot.ImageTrust
	places := map[*stack.Node]string{}
	for _, n := range s.Nodes {
		places[n] = mark(ctx, t, n)
	}
	if err := s.Publish(ctx, func(c *snapshot.Config) {
		before = c.ImageTrust
		c.ImageTrust = snapshot.ImageTrust{Keys: []string{string(pem)}, Revoked: before.Keys}
	}); err != nil {
		t.Fatal(err)
	}
	defer func() { // the other tests sign with the key of before
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
		defer cancel()
		if err := s.Publish(ctx, func(c *snapshot.Config) { c.ImageTrust = before }); err != nil {
			t.Fatal(err)
		}
		active(ctx, t, s.Image)
	}()
	for n, since := range places {
		t.Logf("%s: expected: %s; got: %s", n.Name(), journal.ImageRevoked.Name, strings.TrimSpace(told(ctx, t, n, since, journal.ImageRevoked)))
		asAccount(ctx, t, n, "systemctl --user start "+stack.Runtime+" || true") // somebody means well
		for {
			state, err := n.Property(ctx, stack.Runtime, "ActiveState")
			if err == nil && (state == "inactive" || state == "failed") {
				break
			}
			select {
			case <-ctx.Done():
				t.Fatalf("%s: the runtime is %s (%v)\n%s", n.Name(), state, err, n.Journal(context.WithoutCancel(ctx), 60))
			case <-time.After(100 * time.Millisecond): // systemd is asked on another host
			}
		}
	}
	if err := s.Reg.Sign(ctx, at, k); err != nil {
		t.Fatal(err)
	}
	for n := range places { // it is looked for again by itself; this is sooner
		asAccount(ctx, t, n, "systemctl --user restart resultity-agent.service")
	}
	active(ctx, t, s.Image)
}
