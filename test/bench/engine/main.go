// Command engine is the instant engine with as much of llama-server's command
// line as a node's unit uses. It is no model and no part of a node.
package main

import (
	"log"
	"net/http"
	"os"
	"time"

	"github.com/resultity/node/test/bench/instant"
)

func main() {
	log.SetFlags(0)
	log.Print("this is the instant engine: no model, known words, for measurements only")
	s := &http.Server{
		Addr: instant.Address(os.Args[1:]), Handler: instant.Handler(), ReadHeaderTimeout: 10 * time.Second,
	}
	log.Fatal(s.ListenAndServe())
}
