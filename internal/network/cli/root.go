package cli

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/publish"
)

// rootCommand holds the ceremonies; policy/ceremonies.md has their steps.
func rootCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "root", Short: "Root keys and the roots that they sign: make, change, renew",
		Long: `Root keys and the roots that they sign: make, change, renew.

key, show FILE and sign need no network and no directory: they are for the
machines of the holders. new and publish are for the network's.`,
		Args: func(_ *cobra.Command, a []string) error {
			return fmt.Errorf("%w: which of key, new, show, sign, publish?", errUsage)
		},
		RunE: func(*cobra.Command, []string) error {
			return fmt.Errorf("%w: which of key, new, show, sign, publish?", errUsage)
		},
	}
	cmd.AddCommand(rootKeyCommand(), rootNewCommand(), rootShowCommand(), rootSignCommand(), rootPublishCommand())
	return cmd
}

func rootKeyCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "key FILE.pem", Short: "Make a key, encrypted with a passphrase, and its public half FILE.pub", Args: exactly(1)}
	plain := cmd.Flags().Bool("no-passphrase", false, "leave the key unencrypted")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		file := args[0]
		stem, ok := strings.CutSuffix(file, ".pem")
		if !ok {
			return fmt.Errorf("%w: the name of a key ends in .pem", errUsage)
		}
		if _, err := publish.HolderOf(stem + ".pub"); err != nil { // before anything is made
			return fmt.Errorf("%w: %w", errUsage, err)
		}
		for _, name := range []string{file, stem + ".pub"} {
			if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%s is there already (%w)", name, fs.ErrExist)
			}
		}
		var pass publish.Passphrase
		if !*plain {
			pass = newTerminal(cmd).required
		}
		k, err := publish.MakeKey(file, pass)
		if err != nil {
			return err
		}
		raw, err := k.Public("").PEM()
		if err != nil {
			return err
		}
		if err := writeNew(stem+".pub", raw); err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "key %s\n  private  %s: keep it, and a copy in another place; nobody else needs it\n  public   %s: give it to the network's operator, and tell the id by another way\n", k.ID(), file, stem+".pub")
		return nil
	}
	return cmd
}

func rootNewCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "new", Short: "Write down the next root, for its holders to sign; without flags, a renewal", Args: exactly(0)}
	dir := dirFlag(cmd)
	var c publish.Change
	f := cmd.Flags()
	add := f.StringArray("add", nil, "public key of a new holder, NAME.pub; repeat it for each")
	f.StringArrayVar(&c.Remove, "remove", nil, "holder whose key goes: name, or at least 8 digits of the key's id; repeat it for each")
	f.IntVar(&c.Threshold, "threshold", 0, "how many root keys must sign (default: as many as now)")
	f.StringArrayVar(&c.Renew, "renew", nil, "role that gets a new key in DIR/keys: snapshot, timestamp, or targets where that one lies there; repeat it for each")
	targets := f.String("targets-public", "", "public key of a new targets key that lies elsewhere")
	f.DurationVar(&c.Lifetime, "lifetime", 0, "how long the root is valid (default: that of publish.json)")
	out := f.String("out", "", "file to write (default: root-N.proposal)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		d, err := dir()
		if err != nil {
			return err
		}
		if c.Add, err = readPublics(*add); err != nil {
			return err
		}
		if *targets != "" {
			if c.Targets, err = publish.ReadPublic(*targets); err != nil {
				return err
			}
		}
		var p *publish.Proposal
		if err := asOwner(d, func() (err error) {
			p, err = publish.Propose(d, c)
			return err
		}); err != nil {
			return err
		}
		if *out == "" {
			*out = fmt.Sprintf("root-%d.proposal", len(p.Roots)+1)
		}
		if err := saveNew(*out, p); err != nil {
			return err
		}
		text, err := p.Review(p.Roots[len(p.Roots)-1], time.Now())
		if err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%sNext: each holder runs resultity-network root sign --trusted ROOT --key KEY %s\n", text, *out)
		return nil
	}
	return cmd
}

func rootShowCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "show FILE", Short: "Say in words what a root holds, or what a proposal changes", Args: exactly(1)}
	trusted := cmd.Flags().String("trusted", "", "for a proposal: a root of the network that you trust")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		raw, err := durable.ReadFile(args[0], publish.MaxProposal)
		if err != nil {
			return err
		}
		text, err := publish.Describe(raw)
		if err != nil {
			var p *publish.Proposal
			if p, err = publish.ParseProposal(raw); err != nil {
				return fmt.Errorf("%s is neither a root nor a proposal: %w", args[0], err)
			}
			if text, err = review(p, *trusted); err != nil {
				return err
			}
		}
		_, err = io.WriteString(cmd.OutOrStdout(), text)
		return err
	}
	return cmd
}

func rootSignCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "sign PROPOSAL", Short: "Show what a proposal changes, and sign it if its holder says so", Args: exactly(1)}
	f := cmd.Flags()
	trusted := f.String("trusted", "", "a root of the network that you trust: the first, or any later (not for a network's first root)")
	key := f.String("key", "", "file of the root key (required)")
	out := f.String("out", "", "file to write (default: PROPOSAL with the key's id and .sig for its ending)")
	_ = cmd.MarkFlagRequired("key") // fails for an unknown flag only
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		p, err := readPart(args[0], publish.MaxProposal, publish.ParseProposal)
		if err != nil {
			return err
		}
		text, err := review(p, *trusted)
		if err != nil {
			return err
		}
		t := newTerminal(cmd)
		fmt.Fprint(cmd.OutOrStdout(), text)
		answer, err := t.ask("Sign it? (yes) ", true)
		if err != nil {
			return err
		}
		if answer != "yes" {
			return errors.New("not signed: the answer was not yes")
		}
		k, err := publish.OpenKey(*key, t.required)
		if err != nil {
			return err
		}
		sig, err := p.Sign(k)
		if err != nil {
			return err
		}
		if *out == "" {
			*out = strings.TrimSuffix(args[0], ".proposal") + "." + k.ID()[:8] + ".sig"
		}
		if err := saveNew(*out, sig); err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "signed: %s\n", *out)
		return nil
	}
	return cmd
}

// review is what a holder reads, seen from the root in the file trusted.
func review(p *publish.Proposal, trusted string) (string, error) {
	var root []byte
	switch {
	case trusted != "":
		var err error
		if root, err = durable.ReadFile(trusted, publish.MaxProposal); err != nil {
			return "", err
		}
	case len(p.Roots) > 0:
		return "", fmt.Errorf("%w: --trusted ROOT is needed: the network's first root, or a later one that you have looked at before", errUsage)
	}
	return p.Review(root, time.Now())
}

func rootPublishCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "publish PROPOSAL SIGNATURE...", Short: "Check the signatures of a proposal and publish the root", Args: func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return fmt.Errorf("%w: the proposal and its signatures are missing", errUsage)
		}
		return nil
	}}
	dir := dirFlag(cmd)
	keys := cmd.Flags().StringArray("key", nil, "where the targets key changes: its new file, and its old one; repeat it for each")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		d, err := dir()
		if err != nil {
			return err
		}
		p, err := readPart(args[0], publish.MaxProposal, publish.ParseProposal)
		if err != nil {
			return err
		}
		var sigs []*publish.Signature
		for _, file := range args[1:] {
			s, err := readPart(file, publish.MaxSignature, publish.ParseSignature)
			if err != nil {
				return err
			}
			sigs = append(sigs, s)
		}
		if _, err := p.Signed(sigs); err != nil { // before anybody types a passphrase
			return err
		}
		opened, err := openKeys(cmd, *keys)
		if err != nil {
			return err
		}
		if err := asOwner(d, func() error { return publish.Adopt(d, p, sigs, opened...) }); err != nil {
			return err
		}
		n := len(p.Roots) + 1
		fmt.Fprintf(cmd.OutOrStdout(), "published root %d: %s\n", n, filepath.Join(d, "repository", "metadata", fmt.Sprintf("%d.root.json", n)))
		return nil
	}
	return cmd
}

func readPublics(files []string) (list []publish.Public, err error) {
	for _, file := range files {
		p, err := publish.ReadPublic(file)
		if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
	return list, nil
}

// openKeys opens private keys, and asks for their passphrases.
func openKeys(cmd *cobra.Command, files []string) (list []*publish.Key, err error) {
	t := newTerminal(cmd)
	for _, file := range files {
		k, err := publish.OpenKey(file, t.required)
		if err != nil {
			return nil, err
		}
		list = append(list, k)
	}
	return list, nil
}

// readPart reads a part of a ceremony of at most limit bytes.
func readPart[T any](file string, limit int64, parse func([]byte) (*T, error)) (*T, error) {
	raw, err := durable.ReadFile(file, limit)
	if err != nil {
		return nil, err
	}
	part, err := parse(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return part, nil
}

// saveNew writes a part of a ceremony.
func saveNew(file string, v any) error {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return writeNew(file, append(raw, '\n'))
}

// writeNew makes a file that must not be there: what holders have signed is not
// written over.
func writeNew(file string, raw []byte) error {
	if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is there already: move it away, or write elsewhere (%w)", file, fs.ErrExist)
	}
	failpoint.Here("cli.file.begin")
	return durable.WriteFile(file, raw, 0o644)
}

// terminal asks the person before it. What is no terminal is read line by line.
type terminal struct {
	in  io.Reader
	out io.Writer
	fd  int // -1: no terminal

	new *string // what was given for a new key, for the others made by the same command
}

func newTerminal(cmd *cobra.Command) *terminal {
	t := &terminal{in: cmd.InOrStdin(), out: cmd.ErrOrStderr(), fd: -1}
	if f, ok := t.in.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		t.fd = int(f.Fd())
	}
	return t
}

// ask returns a line, which is shown while it is typed or not.
func (t *terminal) ask(prompt string, shown bool) (string, error) {
	fmt.Fprint(t.out, prompt)
	if t.fd >= 0 && !shown {
		raw, err := term.ReadPassword(t.fd)
		fmt.Fprintln(t.out)
		return string(raw), err
	}
	// Byte by byte: the next question may be another program's.
	line, err := bufio.NewReaderSize(oneByte{t.in}, 16).ReadString('\n')
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return strings.TrimRight(line, "\r\n"), err
}

type oneByte struct{ r io.Reader }

func (o oneByte) Read(b []byte) (int, error) { return o.r.Read(b[:1]) }

// required is a [publish.Passphrase].
func (t *terminal) required(file string, new bool) ([]byte, error) {
	phrase, err := t.passphrase(file, new)
	if err == nil && len(phrase) == 0 {
		err = fmt.Errorf("no passphrase for %s", file)
	}
	return phrase, err
}

// optional is a [publish.Passphrase] that leaves new keys as they are where none is
// given. All new keys get the same.
func (t *terminal) optional(file string, new bool) ([]byte, error) {
	if !new {
		return t.required(file, new)
	}
	if t.new == nil {
		phrase, err := t.passphrase("root and targets keys (empty: unencrypted)", true)
		if err != nil {
			return nil, err
		}
		s := string(phrase)
		t.new = &s
	}
	return []byte(*t.new), nil
}

func (t *terminal) passphrase(file string, new bool) ([]byte, error) {
	phrase, err := t.ask(fmt.Sprintf("Passphrase of %s: ", file), false)
	if err != nil || !new || phrase == "" {
		return []byte(phrase), err
	}
	again, err := t.ask("The same again: ", false)
	if err == nil && again != phrase {
		err = errors.New("the two passphrases differ")
	}
	return []byte(phrase), err
}

func checkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "check", Short: "Verify what is published as nodes do, and say until when it is valid", Args: exactly(0),
		Long: `Verify what is published as nodes do, and say until when it is valid.

Exit status: 0 all is well; 2 something runs out soon; 1 nodes would refuse it.`,
	}
	dir := dirFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		d, err := dir()
		if err != nil {
			return err
		}
		list, err := publish.Check(d)
		due := false
		for _, e := range list {
			left := time.Until(e.Expires)
			text := fmt.Sprintf("in %d days", int(left/(24*time.Hour)))
			if left < 48*time.Hour {
				text = "in " + left.Round(time.Minute).String()
			}
			if left <= 0 {
				text = "expired"
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%-10s version %-5d until %s, %s\n", e.Role, e.Version, e.Expires.UTC().Format(time.RFC3339), text)
			if e.Due {
				due = true
				fmt.Fprintf(cmd.OutOrStdout(), "  ! %s\n", e.Remedy())
			}
		}
		switch {
		case err != nil:
			return err
		case due:
			return errDue
		}
		return nil
	}
	return cmd
}
