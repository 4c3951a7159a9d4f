package agent

import (
	"bytes"
	"context"
	"encoding/hex"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/resultity/node/internal/identity"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/support"
	"github.com/resultity/node/internal/wire"
)

// Units that make up a node.
var nodeUnits = []string{"resultity-agent.service", "resultity-podman.socket", "resultity-podman.service", quadlet.ServiceName}

// Bundle implements [control.Backend].
func (a *Agent) Bundle(ctx context.Context) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	now := time.Now()
	archive := new(support.Archive)
	archive.AddJSON("status.json", a.Status())
	archive.AddJSON("models.json", a.Models())
	if report := a.report.Load(); report != nil {
		archive.AddJSON("doctor.json", report)
	}
	archive.AddJSON("versions.json", struct {
		Agent string    `json:"agent"`
		Go    string    `json:"go"`
		At    time.Time `json:"at"`
		wire.Hardware
	}{a.version, runtime.Version(), now.UTC(), a.profile})
	for _, m := range a.members {
		m.addTo(archive, "networks/"+m.net.Name+"/")
	}
	secretFiles := archive.Configs(a.configFile)
	if a.unitFiles != nil {
		for _, unit := range nodeUnits {
			files, err := a.unitFiles(ctx, unit)
			if err != nil {
				archive.Add("units/"+unit+".error", []byte("the service manager does not say\n"))
				continue
			}
			archive.Units(unit, files, os.Getuid())
		}
	}
	if raw, err := a.surroundings().PodmanInfo(ctx); err == nil {
		archive.AddJSON("podman.json", support.PodmanInfo(raw))
	}
	secrets, err := a.secrets(secretFiles)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := archive.Write(&b, now, secrets); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// addTo adds what an archive has of a network.
func (m *membership) addTo(archive *support.Archive, dir string) {
	archive.AddJSON(dir+"configuration.json", m.board.history())
	if trust, err := m.snaps.Trust(); err == nil {
		archive.AddJSON(dir+"tuf.json", trust)
	} else {
		archive.Add(dir+"tuf.error", []byte(err.Error()+"\n"))
	}
	if m.spool == nil {
		return
	}
	// What may leave the node for the network may leave it here.
	if records, err := m.spool.Recent(support.MaxFile); err == nil {
		archive.Add(dir+"log.jsonl", records)
	} else {
		archive.Add(dir+"log.error", []byte(err.Error()+"\n"))
	}
}

// secrets are what must never be in an archive: the key as it is in memory, and
// all that files hold which protect it or prove who the node is.
func (a *Agent) secrets(files []string) ([][]byte, error) {
	files = append(files, a.cfg.Identity.Passphrase)
	for _, n := range a.cfg.Networks {
		files = append(files, n.EnrolmentToken)
	}
	own, err := filepath.Glob(filepath.Join(a.cfg.Paths.State, "identity/*"))
	if err != nil {
		return nil, err
	}
	if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" {
		files = append(files, filepath.Join(dir, identity.CredentialName))
	}
	secrets, err := support.Secrets(files, own)
	if err != nil {
		return nil, err
	}
	if a.held == nil {
		return secrets, nil
	}
	key, err := hex.DecodeString(a.held.Hex())
	return append(secrets, key), err
}

// history is what became of configurations, for the archive.
type history struct {
	Verified  int64     `json:"verified,omitempty"` // version
	Digest    string    `json:"digest,omitempty"`
	Expires   time.Time `json:"expires,omitzero"`
	Confirmed time.Time `json:"confirmed,omitzero"` // by the network
	Active    int64     `json:"active,omitempty"`   // version
	Step      string    `json:"step,omitempty"`     // on which the verified one stands
	Phase     string    `json:"phase"`
	Restarts  int       `json:"restarts"`
}

func (b *board) history() history {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := history{Confirmed: b.refreshed, Step: string(b.step), Phase: b.phase, Restarts: b.restarts}
	if b.snap != nil {
		h.Verified, h.Digest, h.Expires = b.snap.Version(), b.snap.Digest().String(), b.snap.Expires()
	}
	if b.active != nil {
		h.Active = b.active.Snapshot().Version()
	}
	return h
}
