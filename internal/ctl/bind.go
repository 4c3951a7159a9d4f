package ctl

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/resultity/node/internal/binding"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/wire"
)

// bindOptions are what bind and unbind are called with.
type bindOptions struct {
	wallet, typedData, signature string
	email, code, token           string
}

func (c *command) bindCommand() *cobra.Command {
	var o bindOptions
	cmd := &cobra.Command{
		Use:   "bind (--wallet ADDRESS | --email ADDRESS | --code CODE | --token FILE)",
		Short: "Bind this node to your account",
		Long: `Bind this node to your account, in one of three ways:

  --wallet 0x…           prints what the wallet has to sign (EIP-712, as eth_signTypedData_v4
                         takes it) and reads the signature from standard input. With
                         --typed-data FILE it writes that to FILE and ends; then again with
                         --typed-data FILE --signature 0x… (or - for standard input).
  --email name@domain    has a code sent there; then --code CODE.
  --token FILE           uses an enrolment token, from a file (or - for standard input).

A node that is in several networks is bound in each: --network says in which.
A contract wallet (EIP-1271) cannot be used: only its chain could check what it signs.
One account may have many nodes; a node has one account at a time.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.bind(cmd.Context(), o) },
	}
	f := cmd.Flags()
	walletFlags(cmd, &o)
	f.StringVar(&o.email, "email", "", "have a code sent to this address")
	f.StringVar(&o.code, "code", "", "the code that was sent")
	f.StringVar(&o.token, "token", "", "file with an enrolment token, or -")
	return cmd
}

func (c *command) unbindCommand() *cobra.Command {
	var o bindOptions
	cmd := &cobra.Command{
		Use: "unbind", Short: "Take this node from its account; it gets no jobs until it is bound again",
		Long: `Take this node from its account. It gets no jobs until it is bound again.

Whoever operates the node may do this. With --wallet the account's owner signs for it, as
with bind, and the network's history shows that.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.wallet != "" {
				return c.byWallet(cmd.Context(), binding.Unbind, o)
			}
			if o.typedData != "" || o.signature != "" {
				return fmt.Errorf("%w: --typed-data and --signature go with --wallet", errUsage)
			}
			return c.step(cmd.Context(), control.BindRequest{Step: wire.BindUnbind})
		},
	}
	walletFlags(cmd, &o)
	return cmd
}

func noArgs(cmd *cobra.Command, args []string) error {
	if err := cobra.NoArgs(cmd, args); err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	return nil
}

func walletFlags(cmd *cobra.Command, o *bindOptions) {
	f := cmd.Flags()
	f.StringVar(&o.wallet, "wallet", "", "address of the wallet that signs")
	f.StringVar(&o.typedData, "typed-data", "", "file for what the wallet has to sign")
	f.StringVar(&o.signature, "signature", "", "what the wallet has signed, or -")
}

func (c *command) bind(ctx context.Context, o bindOptions) error {
	ways := 0
	for _, way := range []string{o.wallet, o.email, o.code, o.token} {
		if way != "" {
			ways++
		}
	}
	if ways != 1 {
		return fmt.Errorf("%w: want one of --wallet, --email, --code and --token; see resultityctl bind --help", errUsage)
	}
	if o.wallet == "" && (o.typedData != "" || o.signature != "") {
		return fmt.Errorf("%w: --typed-data and --signature go with --wallet", errUsage)
	}
	switch {
	case o.wallet != "":
		return c.byWallet(ctx, binding.Bind, o)
	case o.token != "":
		token, err := c.readSmall(o.token)
		if err != nil {
			return fmt.Errorf("token: %w", err)
		}
		return c.step(ctx, control.BindRequest{Step: wire.BindToken, Token: token})
	case o.code != "":
		return c.step(ctx, control.BindRequest{Step: wire.BindCode, Code: o.code})
	}
	b, err := c.askBinding(ctx, control.BindRequest{Step: wire.BindEmail, Email: o.email})
	if err != nil {
		return err
	}
	if c.json {
		return c.show(b, nil)
	}
	_, err = fmt.Fprintf(c.Out, "A code is on its way to %s. Enter it within %d minutes:\n\n    resultityctl bind --code CODE\n\nIf it does not come, look into the spam folder; an address gets a few codes an hour at most.\n",
		line(o.email), (b.Expires-b.Now)/60_000)
	return err
}

// askBinding asks the agent, about the network that the command line names or
// that the owner has signed.
func (c *command) askBinding(ctx context.Context, q control.BindRequest) (control.Binding, error) {
	q.Network = c.network
	if q.Network == "" && q.Statement != nil {
		q.Network = q.Statement.Statement.Network
	}
	return c.client().Bind(ctx, q)
}

// step makes one step and shows whose node it is then.
func (c *command) step(ctx context.Context, q control.BindRequest) error {
	b, err := c.askBinding(ctx, q)
	if err != nil {
		return err
	}
	return c.show(b, func(w *tabwriter.Writer) {
		if b.Bound.Account == "" {
			fmt.Fprintf(w, "node %s of network %s is bound to no account\n", b.Node.Hex(), b.Network)
			return
		}
		fmt.Fprintf(w, "node %s of network %s is bound to %s, by %s\n", b.Node.Hex(), b.Network, line(b.Bound.Account), b.Bound.Method)
	})
}

// byWallet has a statement signed, or takes the signature of one that it wrote
// before, and looks whether it holds before anybody else sees it.
func (c *command) byWallet(ctx context.Context, action binding.Action, o bindOptions) error {
	owner, err := evm.ParseAddress(o.wallet)
	if err != nil {
		return fmt.Errorf("%w: --wallet: %w", errUsage, err)
	}
	if o.signature != "" && o.typedData == "" {
		return fmt.Errorf("%w: --signature: of what? name the file that you had signed with --typed-data", errUsage)
	}
	var s binding.Signed
	var chain uint64
	if o.signature != "" {
		raw, err := durable.ReadFile(o.typedData, binding.MaxSize)
		if err != nil {
			return err
		}
		if s.Statement, chain, err = binding.ParseTypedData(raw); err != nil {
			return fmt.Errorf("%s: %w", o.typedData, err)
		}
		if s.Statement.Owner != owner || s.Statement.Action != action {
			return fmt.Errorf("%s is for wallet %s to %s; begin anew", o.typedData, s.Statement.Owner.Hex(), s.Statement.Action)
		}
		text := o.signature
		if text == "-" {
			if text, err = c.readSmall("-"); err != nil {
				return err
			}
		}
		if s.Signature, err = binding.ParseSignature(text); err != nil {
			return err
		}
	} else {
		begun, err := c.askBinding(ctx, control.BindRequest{Step: wire.BindBegin})
		if err != nil {
			return err
		}
		chain = begun.ChainID
		s.Statement = binding.Statement{
			Network: begun.Network, Node: begun.Node, Owner: owner, Action: action, Nonce: begun.Nonce, IssuedAt: begun.Now, ExpiresAt: begun.Expires,
		}
		done, err := c.sign(&s, chain, o)
		if err != nil || done {
			return err
		}
	}
	if err := s.Check(chain); err != nil {
		return err
	}
	return c.step(ctx, control.BindRequest{Step: wire.BindWallet, Nonce: s.Statement.Nonce, Statement: &s})
}

// sign shows what is to be signed and reads the signature, unless it is wanted in
// a file.
func (c *command) sign(s *binding.Signed, chain uint64, o bindOptions) (done bool, err error) {
	data := s.Statement.TypedData(chain)
	until := time.UnixMilli(s.Statement.ExpiresAt).Format(time.TimeOnly)
	if o.typedData != "" {
		if err := os.WriteFile(o.typedData, data, 0o644); err != nil {
			return false, err
		}
		_, err := fmt.Fprintf(c.Err, "Have wallet %s sign %s (eth_signTypedData_v4) before %s. Then:\n\n    resultityctl %s --wallet %s --typed-data %s --signature 0x…\n",
			s.Statement.Owner.Hex(), o.typedData, until, s.Statement.Action, s.Statement.Owner.Hex(), o.typedData)
		return true, err
	}
	if _, err := c.Out.Write(data); err != nil {
		return false, err
	}
	if _, err := fmt.Fprintf(c.Err, "Have wallet %s sign this (eth_signTypedData_v4) before %s, and enter the signature:\n", s.Statement.Owner.Hex(), until); err != nil {
		return false, err
	}
	text, err := bufio.NewReader(io.LimitReader(c.In, maxSmall)).ReadString('\n')
	if strings.TrimSpace(text) == "" {
		return false, errors.Join(errors.New("no signature was entered"), notEOF(err))
	}
	s.Signature, err = binding.ParseSignature(text)
	return false, err
}

func notEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// maxSmall bounds a token or a signature with what is around it, in bytes.
const maxSmall = 4 << 10

// readSmall reads the first line of a file, or of standard input.
func (c *command) readSmall(name string) (string, error) {
	raw, err := c.read(name, maxSmall)
	first, _, _ := bytes.Cut(bytes.TrimSpace(raw), []byte("\n"))
	if err == nil && len(first) == 0 {
		err = errors.New("nothing in it")
	}
	return string(bytes.TrimSpace(first)), err
}
