package ctl

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/support"
)

func (c *command) doctor(ctx context.Context, _ []string) error {
	agent := c.client()
	report, err := agent.Doctor(ctx)
	offline := errors.Is(err, control.ErrNotRunning)
	if offline {
		report, err = c.offline().doctor(ctx), nil
	}
	if err != nil {
		return err
	}
	if err := c.showReport(report); err != nil {
		return err
	}
	if c.bundle != "" {
		var archive []byte
		if offline {
			archive, err = c.offline().archive(ctx, report, c.version)
		} else {
			archive, err = agent.Bundle(ctx)
		}
		if err != nil {
			return err
		}
		if err := writeNew(c.bundle, archive); err != nil {
			return err
		}
		fmt.Fprintf(c.Err, "support archive: %s (%d KiB; look at it before you hand it on)\n", c.bundle, (len(archive)+1023)/1024)
	}
	if report.Failed() {
		return exitError(ExitClosed)
	}
	return nil
}

func (c *command) showReport(r *control.Report) error {
	return c.show(r, func(w *tabwriter.Writer) {
		count := map[control.Result]int{}
		for _, k := range r.Checks {
			count[k.Result]++
			name := k.Name
			if k.Network != "" {
				name += " of " + k.Network
			}
			fmt.Fprintf(w, "%s\t%s\t%s\n", k.Result, name, line(k.Detail))
			if k.Result == control.Fail && k.Remedy != "" {
				fmt.Fprintf(w, "\t\twhat to do: %s\n", line(k.Remedy))
			}
		}
		fmt.Fprintf(w, "\n%d passed, %d failed, %d not measured\n", count[control.Pass], count[control.Fail], count[control.NotMeasured])
	})
}

// writeNew writes a file that only its owner can read, and takes it back if that
// fails. A file that is there stays.
func writeNew(name string, data []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s exists; name another file", name)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(name))
	}
	return nil
}

// doctor says what can be said without an agent.
func (o *offline) doctor(ctx context.Context) *control.Report {
	return &control.Report{
		At:     time.Now().UTC().Truncate(time.Second),
		Checks: append(control.ChecksOf(o.status(ctx).Gates), control.NothingMeasured("only a running agent can try")...),
	}
}

// archive is the support archive of a node whose agent does not run.
func (o *offline) archive(ctx context.Context, r *control.Report, version string) ([]byte, error) {
	now := time.Now()
	a := new(support.Archive)
	a.AddJSON("status.json", o.status(ctx))
	a.AddJSON("doctor.json", r)
	a.AddJSON("versions.json", map[string]string{"resultityctl": version, "at": now.UTC().Format(time.RFC3339)})
	secretFiles := a.Configs(filepath.Join(o.Root, o.config()))
	for _, unit := range []string{agentUnit, "resultity-podman.socket", "resultity-podman.service", "resultity-runtime.service"} {
		raw, err := o.systemctl(ctx, "show", "-p", "SourcePath,FragmentPath,DropInPaths", unit)
		if err != nil {
			continue
		}
		p := properties(raw)
		files := strings.Fields(p["SourcePath"] + " " + p["FragmentPath"] + " " + p["DropInPaths"])
		a.Units(unit, files, o.UID)
	}
	own, err := filepath.Glob(filepath.Join(o.State, "identity/*"))
	if err != nil {
		return nil, err
	}
	secrets, err := support.Secrets(secretFiles, own)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := a.Write(&b, now, secrets); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
