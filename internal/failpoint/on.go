//go:build failpoint

package failpoint

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The environment of a program with fail points.
var (
	order  = os.Getenv("RESULTITY_FAILPOINT")         // file with the point to die at
	offset = os.Getenv("RESULTITY_CLOCK_OFFSET_FILE") // file with a [time.Duration] that is added to the time
)

// way is how far the program has come on the way to its death.
var way struct {
	sync.Mutex // guards what follows, also while the file is read
	order      string
	left       []string
}

// Here marks a point, which may be about a value, and ends the process if it is
// told to.
func Here(name string, about ...any) {
	if order == "" {
		return
	}
	for _, v := range about {
		name += fmt.Sprintf(" %T", v)
	}
	way.Lock()
	defer way.Unlock()
	raw, err := os.ReadFile(order)
	if err != nil {
		return // none is to be reached now
	}
	if text := strings.TrimSpace(string(raw)); text != way.order {
		way.order, way.left = text, strings.Split(text, ">")
	}
	if way.left[0] != name {
		return
	}
	if way.left = way.left[1:]; len(way.left) > 0 {
		return
	}
	if os.Rename(order, order+".reached") != nil {
		return // another process was first
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL) // one may kill oneself
	select {}                                      // it takes a moment; nothing more may happen here
}

// Now is the time by a clock that the file named by RESULTITY_CLOCK_OFFSET_FILE
// sets wrong.
func Now() time.Time {
	now := time.Now()
	raw, err := os.ReadFile(offset)
	if err != nil {
		return now
	}
	d, err := time.ParseDuration(strings.TrimSpace(string(raw)))
	if err != nil {
		return now
	}
	return now.Add(d)
}
