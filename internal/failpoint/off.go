//go:build !failpoint

package failpoint

import "time"

// Here marks a point, which may be about a value.
func Here(string, ...any) {}

// Now is [time.Now], unless a test has set the program's clock wrong.
func Now() time.Time { return time.Now() }
