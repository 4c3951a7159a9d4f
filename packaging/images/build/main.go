// Command build makes a runtime image and prints its digest and the OCI layout
// directory that holds it.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/resultity/node/packaging/images"
	"github.com/resultity/node/packaging/images/llamacpp"
)

// recipes are the images that can be built, by name.
var recipes = map[string]func() images.Recipe{
	"llamacpp": llamacpp.Recipe,
}

func main() {
	var o images.Options
	flag.StringVar(&o.Cache, "cache", "", "`directory` for packages and images (default $RESULTITY_CACHE, else /var/cache/resultity-node or the user's own cache)")
	flag.BoolVar(&o.Refresh, "refresh", false, "get the packages anew, although some are in the cache")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: build [-cache DIR] [-refresh] IMAGE\n\nPrints DIGEST and LAYOUT-DIRECTORY. IMAGE is llamacpp.")
		flag.PrintDefaults()
	}
	flag.Parse()
	recipe, ok := recipes[flag.Arg(0)]
	if !ok || flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	o.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	img, err := images.Build(ctx, recipe(), o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "build:", err)
		os.Exit(1)
	}
	fmt.Println(img.Digest, img.Layout)
}
