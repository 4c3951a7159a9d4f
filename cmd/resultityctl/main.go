// Command resultityctl looks at and steers a Resultity node.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/resultity/node/internal/ctl"
	"github.com/resultity/node/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(ctl.Main(ctx, os.Args[1:], ctl.IO{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Getenv: os.Getenv}, version.String()))
}
