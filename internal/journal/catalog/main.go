// Command catalog writes the journal catalog to the file it is given.
package main

import (
	"bytes"
	"log"
	"os"

	"github.com/resultity/node/internal/journal"
)

func main() {
	var b bytes.Buffer
	if err := journal.WriteCatalog(&b); err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile(os.Args[1], b.Bytes(), 0o644); err != nil {
		log.Fatal(err)
	}
}
