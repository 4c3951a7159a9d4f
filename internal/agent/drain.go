package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/journal"
)

// The operator's drain is of the machine, for all networks. It is a file in the state directory that holds its time, so
// that a restart, an upgrade or a reboot does not take it back.
func (a *Agent) drainFile() string { return filepath.Join(a.cfg.Paths.State, "drained") }

const maxDrain = 100 // bytes; it holds a time

// recallDrain obeys what the operator said to an earlier process. A file that
// cannot be read is a drain too: the operator's word counts more than its time.
func (a *Agent) recallDrain() {
	raw, err := durable.ReadOwn(a.drainFile(), maxDrain)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	since := time.Time{}
	if err == nil {
		since, err = time.Parse(time.RFC3339, strings.TrimSpace(string(raw)))
	}
	if err != nil {
		a.log.Warn("time of the drain not known", "error", err)
	}
	a.drained.Store(&since)
	a.pause()
	a.log.Info("draining", journal.Draining.Attr(), "since", since)
}

func (a *Agent) pause() {
	for _, m := range a.members {
		m.worker.Pause()
		poke(m.beat)
	}
}

// Drain implements [control.Backend].
func (a *Agent) Drain() error {
	a.drain.Lock()
	defer a.drain.Unlock()
	since := a.drained.Load()
	if since == nil {
		now := time.Now().UTC().Truncate(time.Second)
		since = &now
		a.drained.Store(since)
	}
	a.log.Info("draining", journal.Draining.Attr(), "since", *since)
	a.pause()
	failpoint.Here("agent.drain.begin")
	if err := durable.WriteFile(a.drainFile(), []byte(since.Format(time.RFC3339)+"\n"), 0o600); err != nil {
		return fmt.Errorf("the node takes no new jobs, but a restart forgets that: %w", err)
	}
	return nil
}

// Resume implements [control.Backend].
func (a *Agent) Resume() error {
	a.drain.Lock()
	defer a.drain.Unlock()
	a.drained.Store(nil)
	a.log.Info("resumed", journal.Resumed.Attr())
	for _, m := range a.members {
		m.worker.Resume()
		poke(m.beat)
	}
	err := os.Remove(a.drainFile())
	if err == nil {
		failpoint.Here("agent.resume.removed")
		err = durable.SyncDir(a.cfg.Paths.State)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the node takes jobs, but a restart may drain it again: %w; remove %s", err, a.drainFile())
	}
	return nil
}
