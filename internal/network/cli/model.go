package cli

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/resultity/node/internal/snapshot"
)

// listBytes is how many bytes of chunk hashes of one model go into the configuration,
// which has room for 1 MiB; those of more are files of their own.
const listBytes = 64 << 10

// listSuffix is that of such a file, beside the one that it is about.
const listSuffix = ".chunks"

func modelCommand() *cobra.Command {
	m := snapshot.Model{}
	var sources, keys []string
	var format, sig string
	cmd := &cobra.Command{
		Use:   "model DIR --name NAME --version V --source URL",
		Short: "Describe the files of a model for the configuration",
		Long: "Reads every file below DIR and prints what goes into models of config.json: sizes, SHA-256, chunk hashes.\n" +
			"Each --source is where DIR's content is served, https://HOST/PATH, or an OCI artifact that has the files as\n" +
			"layers, oci://HOST/PATH@sha256:…. Where there are too many chunk hashes for the configuration, they are\n" +
			"written beside the file, as FILE" + listSuffix + ", to be served from the first https source, too.",
		Args: exactly(1),
	}
	f := cmd.Flags()
	f.StringVar(&m.Name, "name", "", "name of the model (required)")
	f.StringVar(&m.Version, "version", "", "its version (required)")
	f.StringVar(&format, "format", string(snapshot.GGUF), "gguf or safetensors")
	f.StringArrayVar(&sources, "source", nil, "where the files are to be had; repeat it for each (required)")
	f.StringVar(&sig, "signature", "", "path below DIR of the OpenSSF signature that nodes have to check")
	f.StringArrayVar(&keys, "signature-key", nil, "file of a public key that may sign; repeat it for each")
	for _, name := range []string{"name", "version", "source"} {
		_ = cmd.MarkFlagRequired(name) // fails for an unknown flag only
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		m.Format = snapshot.Format(format)
		if sig != "" {
			m.Signature = &snapshot.Signature{File: sig}
		}
		for _, k := range keys {
			raw, err := os.ReadFile(k)
			if err != nil {
				return err
			}
			if m.Signature == nil {
				return fmt.Errorf("%w: --signature-key without --signature", errUsage)
			}
			m.Signature.Keys = append(m.Signature.Keys, string(raw))
		}
		if err := describe(&m, args[0], sources); err != nil {
			return err
		}
		if err := m.Check(); err != nil {
			return err
		}
		enc := json.NewEncoder(cmd.OutOrStdout())
		enc.SetIndent("", "  ")
		return enc.Encode(m)
	}
	return cmd
}

// describe fills in the files of m, which are below dir.
func describe(m *snapshot.Model, dir string, sources []string) error {
	return describeWithin(m, dir, sources, listBytes)
}

// describeWithin is describe with left bytes for chunk hashes.
func describeWithin(m *snapshot.Model, dir string, sources []string, left int) error {
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		if !d.Type().IsRegular() {
			return fmt.Errorf("%s is no regular file: a model has nothing else", name)
		}
		if strings.HasSuffix(name, listSuffix) { // of an earlier call
			return nil
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close() // read only: nothing can be lost
		rel = filepath.ToSlash(rel)
		var from, lists []string
		for _, s := range sources {
			if strings.HasPrefix(s, snapshot.OCI) {
				from = append(from, s)
				continue
			}
			u, err := url.Parse(s)
			if err != nil {
				return fmt.Errorf("%w: %w", errUsage, err)
			}
			u = u.JoinPath(strings.Split(rel, "/")...)
			from = append(from, u.String())
			u = u.JoinPath("..", path.Base(rel)+listSuffix)
			lists = append(lists, u.String())
		}
		file, err := snapshot.NewFile(rel, f, from...)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if n := len(file.Chunks.Hashes); n > left {
			if len(lists) == 0 {
				return fmt.Errorf("%s: %d bytes of chunk hashes are too many for the configuration: add an https --source, from which they are served", name, n)
			}
			if err := os.WriteFile(name+listSuffix, file.Chunks.Hashes, 0o644); err != nil {
				return err
			}
			file.Chunks.Hashes, file.Chunks.Sources = nil, lists
		} else {
			left -= n
		}
		m.Files = append(m.Files, file)
		return nil
	})
}
