// Command locker locks files, as programs that share them do, until its
// standard input ends.
package main

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	for _, name := range os.Args[1:] {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err == nil {
			err = unix.FcntlFlock(f.Fd(), unix.F_SETLKW, &unix.Flock_t{Type: unix.F_WRLCK})
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "locker: %s: %v\n", name, err)
			os.Exit(1)
		}
	}
	fmt.Println("locked")
	_, _ = io.Copy(io.Discard, os.Stdin) // its end is all that counts
}
