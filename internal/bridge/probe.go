package bridge

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
)

// probeTimeout is for one target. A way that is closed says so at once; one that
// swallows packets is no way either. Tests have less.
var probeTimeout = 2 * time.Second

// Probe tries to reach each target from where this process is and writes what
// came of it, see [contract.ProbeCommand]. It returns the exit code.
func Probe(targets []string, stdout, stderr io.Writer) int {
	if len(targets) == 0 || len(targets) > contract.MaxProbes {
		fmt.Fprintf(stderr, "resultity-bridge: probe: %d targets, want 1 to %d\n", len(targets), contract.MaxProbes)
		return contract.ExitConfig
	}
	reaches := make([]contract.Reach, len(targets))
	done := make(chan struct{})
	for i, t := range targets {
		go func() {
			reaches[i] = reach(t)
			done <- struct{}{}
		}()
	}
	for range targets {
		<-done
	}
	if err := json.NewEncoder(stdout).Encode(reaches); err != nil {
		fmt.Fprintf(stderr, "resultity-bridge: probe: %v\n", err)
		return contract.ExitInternal
	}
	return 0
}

func reach(target string) contract.Reach {
	r := contract.Reach{Target: target}
	network, address, _ := strings.Cut(target, " ")
	c, err := net.DialTimeout(network, address, probeTimeout)
	if err != nil {
		r.Error = err.Error()
		return r
	}
	_ = c.Close() // that it opened is all
	r.Reached = true
	return r
}
