// Command engine is the instant engine with as much of llama-server's command
// line as a node's unit uses. It is no model and no part of a node.
package main

import (
	"log"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/resultity/node/test/bench/instant"
)

func main() {
	option := map[string]string{}
	for i, a := range os.Args[1:] {
		if i+2 < len(os.Args) {
			option[a] = os.Args[i+2]
		}
	}
	log.SetFlags(0)
	log.Print("this is the instant engine: no model, known words, for measurements only")
	s := &http.Server{
		Addr: net.JoinHostPort(option["--host"], option["--port"]), Handler: instant.Handler(), ReadHeaderTimeout: 10 * time.Second,
	}
	log.Fatal(s.ListenAndServe())
}
