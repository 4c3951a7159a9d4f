// Command registry serves a registry of container images over HTTPS: the one of
// the demo and the tests where no other is installed. It keeps images in a
// directory, and which there are in memory.
package main

import (
	"flag"
	"io"
	"log"
	"net/http"
	"os"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
)

func main() {
	listen := flag.String("listen", ":5000", "address")
	dir := flag.String("dir", ".", "where the blobs are kept")
	cert := flag.String("cert", "", "certificate file")
	key := flag.String("key", "", "key file")
	flag.Parse()
	if err := os.MkdirAll(*dir, 0o700); err != nil {
		log.Fatal(err)
	}
	s := &http.Server{
		Addr: *listen, ReadHeaderTimeout: 10 * time.Second,
		Handler: registry.New(
			registry.WithBlobHandler(registry.NewDiskBlobHandler(*dir)),
			registry.Logger(log.New(io.Discard, "", 0)), // a line a request
		),
	}
	log.Fatal(s.ListenAndServeTLS(*cert, *key))
}
