package journal

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/coreos/go-systemd/v22/journal"
)

func TestRecordBecomesFields(t *testing.T) {
	var got map[string]string
	var message string
	var prio journal.Priority
	log := slog.New(&handler{level: slog.LevelInfo, send: func(m string, p journal.Priority, f map[string]string) error {
		message, prio, got = m, p, f
		return nil
	}})
	log.With("network", "testnet").WithGroup("job").Warn("done", JobDone.Attr(), "id", "ab", slog.Group("t", "out-put", 3), "ünicode", true)
	want := map[string]string{
		"MESSAGE_ID": JobDone.ID, "RESULTITY_EVENT": "job-done", "RESULTITY_NETWORK": "testnet",
		"RESULTITY_JOB_ID": "ab", "RESULTITY_JOB_T_OUT_PUT": "3", "RESULTITY_JOB__NICODE": "true",
	}
	if message != "done" || prio != journal.PriWarning || len(got) != len(want) {
		t.Fatalf("%q %v %v, want %v", message, prio, got, want)
	}
	valid := regexp.MustCompile(`^[A-Z][A-Z0-9_]*$`)
	for k, v := range want {
		if got[k] != v || !valid.MatchString(k) {
			t.Errorf("%s = %q, want %q", k, got[k], v)
		}
	}
	if log.Error("not done", "error", io.EOF, "id", "cd"); message != "not done: EOF" || got["RESULTITY_ERROR"] != "EOF" {
		t.Errorf("%q %v: journalctl shows the message alone", message, got)
	}
	got = nil
	if log.Debug("hidden"); got != nil {
		t.Error("a record below the level was sent")
	}
}

func TestEventsAreSound(t *testing.T) {
	ids, names := map[string]bool{}, map[string]bool{}
	hex := regexp.MustCompile(`^[0-9a-f]{32}$`)
	for _, e := range slices.Concat(Events, NetworkEvents) {
		if !hex.MatchString(e.ID) || ids[e.ID] || names[e.Name] || e.Subject == "" || e.Text == "" {
			t.Errorf("event %s: bad or repeated id, name or text", e.Name)
		}
		ids[e.ID], names[e.Name] = true, true
	}
}

// Every event either tells of something that somebody may have to look at, and is in
// the README's chapter on troubleshooting, or is one of these.
func TestTroublesAreDecided(t *testing.T) {
	calm := strings.Fields(`agent-ready agent-stopping bound draining generation-active generation-phase generation-pinned
		generation-staged generation-unpinned identity-created image-checked image-ready job-done job-replayed membership-ended
		model-ready models-shared network-leads order-done order-drain order-logs order-restart order-resume order-revalidate
		order-shutdown receipt-log-reset receipt-log-restored registered resumed routable runtime-active runtime-replaced runtime-shared
		runtime-starting sandbox-recorded scrub-done session-opened signer-ready snapshot-verified unbound validated`)
	for _, e := range Events {
		if troubles.MatchString(e.Name) == slices.Contains(calm, e.Name) {
			t.Errorf("%s: decide whether it is a trouble", e.Name)
		}
		calm = slices.DeleteFunc(calm, func(name string) bool { return name == e.Name })
	}
	if len(calm) > 0 {
		t.Errorf("no events: %q", calm)
	}
}

func TestCatalogIsCurrent(t *testing.T) {
	for _, c := range Catalogs {
		var want bytes.Buffer
		if err := WriteCatalog(&want, c.Events, c.Page); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile("../../units/" + c.File)
		if err != nil || len(c.Events) == 0 || !bytes.Equal(got, want.Bytes()) {
			t.Fatalf("units/%s is not current (%v): run go generate ./internal/journal", c.File, err)
		}
	}
}

// A record about one of many says in the message which.
func TestFactsAreInTheMessage(t *testing.T) {
	var got string
	h := &handler{level: slog.LevelInfo, facts: true, send: func(m string, _ journal.Priority, _ map[string]string) error {
		got = m
		return nil
	}}
	slog.New(h).With("node", "0x1").Warn("frame refused", NodeFrameRefused.Attr(), "reason", "tag", "text", "a\nb c", "error", io.EOF)
	if want := `frame refused: EOF node=0x1 event=node-frame-refused reason=tag text="a\nb c"`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestTextNamesEvents(t *testing.T) {
	var b strings.Builder
	slog.New(Text(&b, slog.LevelInfo)).Info("x", JobDone.Attr())
	if !strings.Contains(b.String(), "event=job-done") {
		t.Errorf("line %q does not name its event", b.String())
	}
}
