// Command loader runs on a host: it reads what to do from its standard input
// and prints what came of it, see package load. As "loader spin" it does
// nothing but keep one core busy; "loader source" and "loader relay" are the
// ends and steps of a way for bytes.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/resultity/node/test/bench/load"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "loader:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return work()
	}
	switch args[0] {
	case "spin":
		for n := uint64(0); ; n++ { // until it is killed
			_ = n
		}
	case "source":
		return load.Source(args[1])
	case "relay":
		return load.Relay(args[1], args[2] == "true", args[3])
	}
	return fmt.Errorf("%q: not a part that it plays", args[0])
}

func work() error {
	var s load.Spec
	if err := json.NewDecoder(os.Stdin).Decode(&s); err != nil {
		return err
	}
	out, err := load.Run(context.Background(), &s)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}
