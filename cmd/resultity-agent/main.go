// Command resultity-agent is the control layer of a Resultity node.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/resultity/node/internal/agent"
	"github.com/resultity/node/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(agent.Main(ctx, os.Args[1:], os.Stdout, os.Stderr, os.Getenv, version.String()))
}
