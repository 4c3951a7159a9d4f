package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/stack"
)

// TestScrubMendsDamage flips a byte of the model that is served, where it lies on
// disk. The scrub, which systemd runs at the lowest priority, finds it; the node
// leaves service, fetches the file anew and is back.
func TestScrubMendsDamage(t *testing.T) {
	n := s.Nodes[1]
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := n.WaitRoutable(ctx); err != nil {
		t.Fatal(err)
	}
	on := func(args ...string) string {
		t.Helper()
		out, err := n.Output(ctx, args...)
		if err != nil {
			t.Fatalf("%q: %v\n%s\n%s", args, err, out, n.Journal(context.WithoutCancel(ctx), 60))
		}
		return strings.TrimSpace(string(out))
	}
	count := func(e *journal.Event) int {
		t.Helper()
		return strings.Count(on("journalctl", "-q", "--no-pager", "-o", "json", "--output-fields=MESSAGE_ID", "MESSAGE_ID="+e.ID, "+", "MESSAGE_ID="+journal.AgentReady.ID), e.ID)
	}
	for _, unit := range []string{"resultity-scrub.timer"} {
		if state, err := n.Property(ctx, unit, "ActiveState"); err != nil || state != "active" {
			t.Errorf("%s is %s, %v", unit, state, err)
		}
	}
	if class, err := n.Property(ctx, "resultity-scrub.service", "IOSchedulingClass"); err != nil || class != "3" && class != "idle" {
		t.Errorf("I/O class %q, %v", class, err)
	}
	if err := n.UserCtl(ctx, "start", "--wait", "resultity-scrub.service"); err != nil {
		t.Fatalf("%v\n%s", err, n.Journal(ctx, 40))
	}
	if c := count(journal.ModelDamaged); c != 0 {
		t.Fatalf("%d damaged files before there was one", c)
	}
	before, err := n.Property(ctx, stack.Runtime, "InvocationID")
	if err != nil {
		t.Fatal(err)
	}
	blob := on("find", n.State, "-path", "*/blobs/"+model.SHA256)
	on("sh", "-c", `printf '\377' | dd of="$0" bs=1 seek=1500000 conv=notrunc status=none && sync "$0"`, blob)
	if sum := on("sha256sum", blob); strings.HasPrefix(sum, model.SHA256) {
		t.Fatal("the byte was 0xff already")
	}
	began := time.Now()
	if err := n.UserCtl(ctx, "start", "--wait", "resultity-scrub.service"); err != nil {
		t.Fatalf("%v\n%s", err, n.Journal(ctx, 40))
	}
	err = n.WaitStatus(ctx, "another start of the runtime that gets jobs", func(st *control.Status) bool {
		now, err := n.Property(ctx, stack.Runtime, "InvocationID")
		return err == nil && now != before && now != "" && !isClosed(st)
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, n.Journal(context.WithoutCancel(ctx), 60))
	}
	t.Logf("found, repaired and back after %v", time.Since(began).Round(time.Millisecond))
	if c := count(journal.ModelDamaged); c != 1 {
		t.Errorf("%d damaged files in the journal", c)
	}
	if sum := on("sha256sum", blob); !strings.HasPrefix(sum, model.SHA256) {
		t.Error("the file is still damaged")
	}
}

// TestScrubFindsAnAlteredImage changes a file of the image whose container runs.
func TestScrubFindsAnAlteredImage(t *testing.T) {
	n := s.Nodes[0]
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := n.WaitRoutable(ctx); err != nil {
		t.Fatal(err)
	}
	scrub := func() {
		t.Helper()
		if err := n.UserCtl(ctx, "start", "--wait", "resultity-scrub.service"); err != nil {
			t.Fatalf("%v\n%s", err, n.Journal(ctx, 40))
		}
	}
	since := mark(ctx, t, n)
	scrub()
	told(ctx, t, n, since, journal.ImageChecked)
	for what, want := range map[string]string{"IOSchedulingClass": "idle", "Nice": "10"} {
		if got, err := n.Property(ctx, "resultity-podman.service", what); err != nil || got != want && got != "3" {
			t.Errorf("%s of Podman's service is %q, %v", what, got, err)
		}
	}
	before, err := n.Property(ctx, stack.Runtime, "InvocationID")
	if err != nil {
		t.Fatal(err)
	}
	since = mark(ctx, t, n)
	asAccount(ctx, t, n, `f=$(find ~/.local/share/containers/storage/overlay/*/diff -type f ! -perm /111 ! -name '*.so*' -size +0 | head -n 1)
		test -n "$f"
		t=$(stat -c %y "$f"); printf '\377' | dd of="$f" conv=notrunc bs=1 status=none; touch -d "$t" "$f"`)
	began := time.Now()
	scrub()
	if why := told(ctx, t, n, since, journal.ImageAltered); !strings.Contains(why, "file integrity checksum failed") {
		t.Errorf("not for what was done: %s", why)
	}
	active(ctx, t, s.Image)
	if now, err := n.Property(ctx, stack.Runtime, "InvocationID"); err != nil || now == before {
		t.Errorf("the runtime went on: %v", err)
	}
	t.Logf("found, pulled again and back after %v", time.Since(began).Round(time.Millisecond))
}

func isClosed(st *control.Status) bool { return st.Closed() != (*gate.Gate)(nil) }
