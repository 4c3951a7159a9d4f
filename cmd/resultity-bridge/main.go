// Command resultity-bridge is PID 1 of the sealed runtime container. The agent
// renders its command line; nobody types it.
//
// Usage:
//
//	resultity-bridge --model NAME --max-in-flight N [FLAG VALUE]... -- ENGINE [ARG]...
//	resultity-bridge probe TARGET...
//	resultity-bridge launch
//
// Its flags, exit codes and behaviour are those of package
// github.com/resultity/node/internal/bridge/contract.
package main

import (
	"os"

	"github.com/resultity/node/internal/bridge"
	"github.com/resultity/node/internal/bridge/contract"
)

func main() {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case contract.ProbeCommand:
			os.Exit(bridge.Probe(os.Args[2:], os.Stdout, os.Stderr))
		case contract.LaunchCommand:
			os.Exit(bridge.Launch())
		}
	}
	os.Exit(bridge.Main(os.Args[1:], os.Stderr))
}
