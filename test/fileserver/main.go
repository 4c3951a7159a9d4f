// Command fileserver serves a directory over HTTPS, with ranges: the model
// source of the tests and the demo.
package main

import (
	"flag"
	"log"
	"net/http"
	"time"
)

func main() {
	listen := flag.String("listen", ":9443", "address")
	dir := flag.String("dir", ".", "what to serve")
	cert := flag.String("cert", "", "certificate file")
	key := flag.String("key", "", "key file")
	flag.Parse()
	s := &http.Server{Addr: *listen, Handler: http.FileServer(http.Dir(*dir)), ReadHeaderTimeout: 10 * time.Second}
	log.Fatal(s.ListenAndServeTLS(*cert, *key))
}
