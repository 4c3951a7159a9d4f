// Command resultity-network is the reference network: the server side of the
// protocol, its public API and its configuration repository in one process.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/resultity/node/internal/network/cli"
	"github.com/resultity/node/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(cli.Main(ctx, os.Args[1:], os.Stdout, os.Stderr, version.String()))
}
