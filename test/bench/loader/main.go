// Command loader runs on a host: it reads what to do from its standard input
// and prints what came of it, see package load. As "loader spin" it does
// nothing but keep one core busy.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/resultity/node/test/bench/load"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "spin" {
		for n := 0; ; n++ { // until it is killed
		}
	}
	var s load.Spec
	err := json.NewDecoder(os.Stdin).Decode(&s)
	if err == nil {
		var out []load.Outcome
		if out, err = load.Run(context.Background(), &s); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(out)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "loader:", err)
		os.Exit(1)
	}
}
