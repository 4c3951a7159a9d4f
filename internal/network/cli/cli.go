// Package cli owns the command line of resultity-network.
//
// The rule it keeps: a mistake in the configuration ends with status 78 and names
// the key and what was expected, so that a service manager does not try again.
package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/publish"
	"github.com/resultity/node/internal/snapshot"
)

// Exit statuses beside 0 and 1. The unit sets RestartPreventExitStatus=78, since
// a start that fails so would fail again.
const (
	exitDue          = 2 // also where answers differ
	exitIncomparable = 3
	exitUsage        = 64
	exitConfig       = 78
)

var (
	errUsage = errors.New("usage")
	errDue   = errors.New("something runs out soon")
)

// Main runs the program and returns its exit status.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer, version string) int {
	cmd := root(version)
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(stderr, "resultity-network:", err)
	switch {
	case errors.Is(err, network.ErrConfig):
		return exitConfig
	case errors.Is(err, errUsage):
		return exitUsage
	case errors.Is(err, errDue), errors.Is(err, errDiffers):
		return exitDue
	case errors.Is(err, errIncomparable):
		return exitIncomparable
	}
	return 1
}

func root(version string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "resultity-network",
		Short: "Run a Resultity network: its nodes, its API, its configuration",
		Long: `Run a Resultity network: its nodes, its API, its configuration.

Every command but version, root key, root show and root sign works on one
network's directory, --dir, where root acts as the directory's owner. Those about
tokens, keys, nodes, accounts, orders, jobs and logs ask the service while it runs, and
open its store when it does not.

Exit status: 0 done; 1 failed; 2 something runs out soon (check), or answers differ
(jobs replay); 3 they cannot be compared; 64 wrong command line; 78 wrong
configuration.`,
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		// Without these cobra takes no command, and any other, for a call for help.
		Args: func(_ *cobra.Command, a []string) error {
			if len(a) > 0 {
				return fmt.Errorf("%w: unknown command %q; see resultity-network --help", errUsage, a[0])
			}
			return nil
		},
		RunE: func(*cobra.Command, []string) error {
			return fmt.Errorf("%w: which command? see resultity-network --help", errUsage)
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return fmt.Errorf("%w: %w", errUsage, err) })
	cmd.CompletionOptions.HiddenDefaultCmd = true
	cmd.AddCommand(initCommand(), modelCommand(), publishCommand(), rootCommand(), checkCommand(), serveCommand(), tokenCommand(), apikeyCommand(), nodesCommand(), accountsCommand(), damageCommand(), orderCommand(), ordersCommand(), jobsCommand(), logsCommand(), versionCommand(version))
	return cmd
}

// dirFlag adds --dir and returns a function that makes it absolute.
func dirFlag(cmd *cobra.Command) func() (string, error) {
	dir := cmd.Flags().String("dir", network.Defaults().Dir, "directory of the network")
	return func() (string, error) { return filepath.Abs(*dir) }
}

// quiet is for commands whose store would otherwise talk about itself.
func quiet(cmd *cobra.Command) *slog.Logger {
	return slog.New(journal.Text(cmd.ErrOrStderr(), slog.LevelWarn))
}

func initCommand() *cobra.Command {
	var o network.InitOptions
	var holders []string
	var targets, first string
	life := publish.DefaultLifetimes
	cmd := &cobra.Command{
		Use: "init --name NAME --chain-id ID", Short: "Make a network: keys, an empty repository, a first API key and enrolment token", Args: exactly(0),
	}
	dir := dirFlag(cmd)
	f := cmd.Flags()
	f.StringVar(&o.Name, "name", "", "name of the network (required)")
	f.Uint64Var(&o.ChainID, "chain-id", 0, "EIP-155 chain id of its receipts (required)")
	f.StringSliceVar(&o.Publish.RootKeys, "root-key", nil, "file of a root key, made when missing; repeat it for each (default: three in DIR/keys)")
	f.StringArrayVar(&holders, "root-holder", nil, "instead: public key, NAME.pub, that a holder has made with root key; repeat it for each")
	f.StringVar(&targets, "targets-public", "", "instead of --targets-key: public key of a targets key that lies elsewhere")
	f.StringVar(&first, "out", "root-1.proposal", "with --root-holder: file for the first root, which the holders sign")
	f.StringVar(&o.Publish.TargetsKey, "targets-key", "", "file of the targets key, made when missing (default: DIR/keys/targets.pem)")
	f.IntVar(&o.Publish.Threshold, "root-threshold", 0, "how many root keys must sign (default: more than half)")
	f.DurationVar(&life.Timestamp, "timestamp-lifetime", life.Timestamp, "how long nodes believe the newest word of the network; bounds how long somebody can hide news from them")
	f.IntVar(&o.TokenUses, "nodes", 10, "how many nodes the first enrolment token is good for")
	_ = cmd.MarkFlagRequired("name")     // fails for an unknown flag only
	_ = cmd.MarkFlagRequired("chain-id") // likewise
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		d, err := dir()
		if err != nil {
			return err
		}
		o.Publish.Lifetimes = life
		if o.Publish.Holders, err = readPublics(holders); err != nil {
			return err
		}
		if targets != "" {
			if o.Publish.Targets, err = publish.ReadPublic(targets); err != nil {
				return err
			}
		}
		if len(holders) > 0 && o.Publish.RootKeys != nil || targets != "" && o.Publish.TargetsKey != "" {
			return fmt.Errorf("%w: a key is given by its private and by its public half", errUsage)
		}
		o.Publish.Passphrase = newTerminal(cmd).optional
		key, p, err := network.Init(cmd.Context(), d, o, quiet(cmd))
		if err != nil {
			return err
		}
		out := cmd.OutOrStdout()
		fmt.Fprintf(out, "network %s\n", o.Name)
		if p != nil {
			if err := saveNew(first, p); err != nil {
				return err
			}
			fmt.Fprintf(out, "The holders have to sign the first root, %s: resultity-network root sign. Then: resultity-network root publish.\n", first)
		}
		for _, l := range [][2]string{
			{"message key", key.Hex()},
			{"first root", filepath.Join(d, "repository", "metadata", "1.root.json")},
			{"API key", filepath.Join(d, "api-key")},
			{"enrolment token", filepath.Join(d, "enrolment-token")},
			{"configuration", filepath.Join(d, snapshot.Target)},
		} {
			fmt.Fprintf(out, "  %-16s %s\n", l[0], l[1])
		}
		fmt.Fprintln(out, "Nodes need the first root.")
		exposed, err := publish.Exposed(d)
		if err != nil {
			return err
		}
		if len(exposed) > 0 {
			fmt.Fprintf(out, "Keep these on other media, serve needs none of them: %s\n", strings.Join(exposed, ", "))
		}
		fmt.Fprintf(out, "Next: fill in the configuration, then resultity-network publish --dir %s --config %s\n", d, filepath.Join(d, snapshot.Target))
		return nil
	}
	return cmd
}

func publishCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "publish --config FILE", Short: "Publish a configuration; a running service and its nodes take it over", Args: exactly(0),
	}
	dir := dirFlag(cmd)
	config := cmd.Flags().String("config", "", "the configuration, config.json (required)")
	keys := cmd.Flags().StringArray("key", nil, "file of a key that does not lie in DIR/keys, such as the targets key; repeat it for each")
	_ = cmd.MarkFlagRequired("config") // fails for an unknown flag only
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		d, err := dir()
		if err != nil {
			return err
		}
		raw, err := durable.ReadFile(*config, snapshot.MaxSize)
		if err != nil {
			return fmt.Errorf("%w: config: %w", network.ErrConfig, err)
		}
		opened, err := openKeys(cmd, *keys)
		if err != nil {
			return err
		}
		return asOwner(d, func() error {
			if err := network.Publish(d, raw, opened...); err != nil {
				return err
			}
			snap, err := publish.Current(d)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "published version %d, %s\n", snap.Version(), snap.Digest())
			return network.Reload(cmd.Context(), d)
		})
	}
	return cmd
}

// asOwner calls f. Root does what f does as the account that the network's directory
// belongs to: the service, which runs as that, can use what f writes, and nothing
// that it has put there leads f to files that are not the account's. The files of
// the command line are root's: they are opened before, and written after.
func asOwner(dir string, f func() error) (err error) {
	st, statErr := os.Stat(dir)
	if statErr != nil || os.Geteuid() != 0 {
		return f() // which says what is wrong with the directory
	}
	owner, ok := st.Sys().(*syscall.Stat_t)
	if !ok || owner.Uid == 0 {
		return f()
	}
	groups, err := syscall.Getgroups()
	if err != nil {
		return err
	}
	gid := syscall.Getegid()
	defer func() {
		if back := cmp.Or(syscall.Setresuid(-1, 0, -1), syscall.Setresgid(-1, gid, -1), syscall.Setgroups(groups)); back != nil {
			err = errors.Join(err, fmt.Errorf("act as root again: %w", back))
		}
	}()
	if err := cmp.Or(syscall.Setgroups(nil), syscall.Setresgid(-1, int(owner.Gid), -1), syscall.Setresuid(-1, int(owner.Uid), -1)); err != nil {
		return fmt.Errorf("act as the owner of %s: %w", dir, err)
	}
	return f()
}

func withAdmin(cmd *cobra.Command, dir string, f func(network.Admin) error) error {
	return asOwner(dir, func() error {
		a, err := network.OpenAdmin(cmd.Context(), dir, quiet(cmd))
		if err != nil {
			return err
		}
		defer a.Close()
		return f(a)
	})
}

func serveCommand() *cobra.Command {
	c := network.Defaults()
	var file string
	cmd := &cobra.Command{Use: "serve", Short: "Serve the network until told to stop", Args: exactly(0)}
	f := cmd.Flags()
	f.StringVar(&file, "config", "", "network.toml; flags win over it (default: "+network.ConfigFile+", if it is there)")
	f.StringVar(&c.Dir, "dir", c.Dir, "directory of the network")
	f.StringVar(&c.Listen, "listen", c.Listen, "host:port; an empty host means every address")
	f.StringVar(&c.MetricsListen, "metrics-listen", c.MetricsListen, "host:port of GET /metrics; empty for nowhere")
	f.StringVar(&c.TLSCert, "tls-cert", c.TLSCert, "certificate chain, PEM")
	f.StringVar(&c.TLSKey, "tls-key", c.TLSKey, "its key, PEM")
	f.StringVar(&c.LogLevel, "log-level", c.LogLevel, "debug, info, warn or error")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if _, err := os.Stat(network.ConfigFile); file == "" && !errors.Is(err, fs.ErrNotExist) {
			file = network.ConfigFile
		}
		if file != "" {
			given := c
			if err := c.ReadFile(file); err != nil {
				return err
			}
			for name, v := range map[string][2]*string{
				"dir": {&c.Dir, &given.Dir}, "listen": {&c.Listen, &given.Listen}, "metrics-listen": {&c.MetricsListen, &given.MetricsListen}, "tls-cert": {&c.TLSCert, &given.TLSCert},
				"tls-key": {&c.TLSKey, &given.TLSKey}, "log-level": {&c.LogLevel, &given.LogLevel},
			} {
				if f.Changed(name) {
					*v[0] = *v[1]
				}
			}
		}
		var err error
		if c.Dir, err = filepath.Abs(c.Dir); err != nil {
			return err
		}
		var level slog.Level
		_ = level.UnmarshalText([]byte(c.LogLevel)) // Run says what is wrong with it
		return network.Run(cmd.Context(), c, journal.NewWithFacts(cmd.ErrOrStderr(), level))
	}
	return cmd
}

func tokenCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Enrolment tokens, with which nodes register"}
	create := &cobra.Command{Use: "create", Short: "Make a token and print it; it is not kept", Args: exactly(0)}
	dir := dirFlag(create)
	uses := create.Flags().Int("uses", 1, "how many nodes may register with it")
	expires := create.Flags().Duration("expires", 24*time.Hour, "how long it is good for")
	account := create.Flags().String("account", "operator", "account that the nodes belong to")
	create.RunE = func(cmd *cobra.Command, _ []string) error {
		d, err := dir()
		if err != nil {
			return err
		}
		return withAdmin(cmd, d, func(a network.Admin) error {
			token, err := a.CreateToken(cmd.Context(), *uses, *account, time.Now().Add(*expires))
			if err == nil {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), token)
			}
			return err
		})
	}
	cmd.AddCommand(create)
	return cmd
}

func apikeyCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "apikey", Short: "API keys, with which clients send requests"}
	create := &cobra.Command{Use: "create --name NAME", Short: "Make an API key and print it; it is not kept", Args: exactly(0)}
	revoke := &cobra.Command{Use: "revoke --name NAME", Short: "Revoke every API key of a name", Args: exactly(0)}
	for _, c := range []struct {
		cmd *cobra.Command
		run func(ctx context.Context, a network.Admin, name string, out io.Writer) error
	}{
		{create, func(ctx context.Context, a network.Admin, name string, out io.Writer) error {
			key, err := a.CreateAPIKey(ctx, name)
			if err == nil {
				_, err = fmt.Fprintln(out, key)
			}
			return err
		}},
		{revoke, func(ctx context.Context, a network.Admin, name string, out io.Writer) error {
			n, err := a.RevokeAPIKeys(ctx, name)
			if err == nil && n == 0 {
				err = fmt.Errorf("no API key is named %q", name)
			}
			if err == nil {
				_, err = fmt.Fprintf(out, "revoked %d\n", n)
			}
			return err
		}},
	} {
		dir := dirFlag(c.cmd)
		name := c.cmd.Flags().String("name", "", "whose key it is (required)")
		_ = c.cmd.MarkFlagRequired("name") // fails for an unknown flag only
		c.cmd.RunE = func(cmd *cobra.Command, _ []string) error {
			d, err := dir()
			if err != nil {
				return err
			}
			return withAdmin(cmd, d, func(a network.Admin) error {
				return c.run(cmd.Context(), a, *name, cmd.OutOrStdout())
			})
		}
		cmd.AddCommand(c.cmd)
	}
	return cmd
}

func versionCommand(version string) *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Print the version", Args: exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		_, err := fmt.Fprintln(cmd.OutOrStdout(), "resultity-network", version)
		return err
	}}
}
