// Command resultity-signer holds a node's key and signs what the agent states.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/resultity/node/internal/signer/cli"
	"github.com/resultity/node/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Getenv, version.String()))
}
