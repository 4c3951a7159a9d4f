// Package version says which version of the project this program is: from the
// link-time override of a packager, or else from what Go recorded of the
// version control.
package version

import "runtime/debug"

// override is set by packagers who build without version control:
// -ldflags "-X github.com/resultity/node/internal/version.override=1.2.3".
var override string

// String returns the version, never empty.
func String() string {
	if override != "" {
		return override
	}
	if b, ok := debug.ReadBuildInfo(); ok && b.Main.Version != "" {
		return b.Main.Version
	}
	return "(devel)"
}
