// Package cli owns the command resultity-signer: the service that signs, and
// what its operator does with the key.
//
// The rule it keeps: a key is never without a copy on disk while it is moved, and
// a command that was cut short may be given again.
package cli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/ethereum/go-ethereum/accounts/keystore"

	"github.com/resultity/node/internal/journal"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 64
)

var errUsage = errors.New("wrong command line; see resultity-signer --help")

const usage = `usage: resultity-signer [flags] COMMAND

  show               who the key's node is, and what it signs for
  init               make a key, where there is none
  migrate            take the key over from the agent, and remove it there
  export FILE        write an Ethereum keystore file, for a backup
  import FILE        take the key of such a file; its node moves to this machine
  rotate             make a new key in place of the old one, which is kept beside it
  serve              sign; systemd does this (resultity-signer.service)
  version            print the version

A passphrase of a keystore file is read from the file of --passphrase. All but
serve and export --from are for root. Exit status: 0 done, 1 failed, 64 wrong
command line.

`

type command struct {
	out, err   *os.File
	in         io.Reader
	scryptN    int // cost of a keystore file
	env        func(string) string
	log        *slog.Logger
	from       string
	passphrase string
	allow      string
	root       string // before all paths; for tests
	systemd    func(ctx context.Context, name string, stdin []byte, args ...string) ([]byte, error)
}

// Main reads the command line and does what it says. It returns the exit code.
func Main(ctx context.Context, args []string, stdin io.Reader, stdout, stderr *os.File, env func(string) string, version string) int {
	c := &command{out: stdout, err: stderr, in: stdin, env: env, log: journal.New(stderr, slog.LevelInfo), systemd: run, scryptN: keystore.StandardScryptN}
	flags := flag.NewFlagSet("resultity-signer", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { fmt.Fprint(stderr, usage); flags.PrintDefaults() }
	flags.StringVar(&c.from, "from", "", "identity `directory` of the agent, for migrate and export (default: that of the account resultity, for migrate)")
	flags.StringVar(&c.passphrase, "passphrase", "", "`file` with the passphrase of the keystore file, at least 12 characters")
	flags.StringVar(&c.allow, "allow", "", "sign for these networks and chains only, for serve: `NAME:CHAIN,…` (default: the first 8 that are asked for)")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return exitOK
		}
		return exitUsage
	}
	verb, rest := flags.Arg(0), flags.Args()[min(1, flags.NArg()):]
	var err error
	switch {
	case verb == "version" && len(rest) == 0:
		fmt.Fprintln(stdout, version)
	case verb == "serve" && len(rest) == 0:
		if err = c.serve(ctx); err != nil {
			c.log.Error("cannot sign", journal.SignerFailed.Attr(), "error", err)
			return exitFailed
		}
	case verb == "show" && len(rest) == 0:
		err = c.show(ctx)
	case verb == "init" && len(rest) == 0:
		err = c.init(ctx)
	case verb == "migrate" && len(rest) == 0:
		err = c.migrate(ctx)
	case verb == "export" && len(rest) == 1:
		err = c.export(ctx, rest[0])
	case verb == "import" && len(rest) == 1:
		err = c.importKey(ctx, rest[0])
	case verb == "rotate" && len(rest) == 0:
		err = c.rotate(ctx)
	default:
		flags.Usage()
		return exitUsage
	}
	if err != nil {
		fmt.Fprintln(stderr, "resultity-signer:", err)
		if errors.Is(err, errUsage) {
			return exitUsage
		}
		return exitFailed
	}
	return exitOK
}
