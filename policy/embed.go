// Package policy holds what a node trusts before anybody has told it anything:
// no image at all. README.md beside it lists who is trusted for what.
package policy

import _ "embed"

// JSON is Podman's policy.json of a node without a configuration: every image
// is refused.
//
//go:embed policy.json
var JSON []byte
