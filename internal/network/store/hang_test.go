package store

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/resultity/node/internal/evm"
)

// hangIn names the store that a child of the tests has open when it hangs.
const hangIn = "RESULTITY_TEST_HANG_IN"

// JetStream tries for ever to remove a damaged record, and does not end. The service ends
// then; its next start mends it.
func TestStuck(t *testing.T) {
	if dir := os.Getenv(hangIn); dir != "" {
		hang(t, dir)
	}
	w := newWorld(t)
	w.s.Close()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestStuck$")
	cmd.Env = append(os.Environ(), hangIn+"="+w.dir)
	began := time.Now()
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 42 {
		t.Fatalf("%v after %v\n%s", err, time.Since(began), out)
	}
	w.open(t)
	for _, err := range w.all(t) {
		t.Error(err)
	}
	if err := w.write(t.Context()); err != nil {
		t.Error(err)
	}
	if got := w.s.Damaged(); got["mended"] != 1 || got["lost"] != 0 {
		t.Errorf("%v\n%s", got, w.log.String())
	}
}

// hang runs a store until it says that JetStream does not end, and ends the process.
func hang(t *testing.T, dir string) {
	closeTimeout = 2 * time.Second
	w := &world{dir: dir}
	w.open(t)
	file := w.blk(t, "KV_RECEIPTLOGS")
	at, _ := live(t, file)
	flip(t, file, at+3, 0x80) // the header bit: JetStream takes the record for deleted, and for there
	for n := range byte(3) {
		raw, err := json.Marshal(&ReceiptLog{LogSummary: LogSummary{From: uint64(n)}})
		if err != nil {
			t.Fatal(err)
		}
		if n == 2 {
			opTimeout = time.Second // this one is not answered
		}
		d, limited, end, err := w.s.write(context.Background(), needed, len(raw))
		if err != nil {
			t.Fatal(err)
		}
		_, err = d.receiptlogs.Put(limited, nodeKey(evm.Address{n + 1}), raw)
		end()
		if (err != nil) != (n == 2) {
			t.Fatalf("record %d: %v", n, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := w.s.Run(ctx, slog.Default(), func(uint64) {}); !errors.Is(err, errStuck) {
		t.Fatalf("%v\n%s", err, w.log.String())
	}
	os.Exit(42)
}
