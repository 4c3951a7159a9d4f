// Package quadlet holds the template of the runtime's Quadlet unit. It is a
// package only because embedding cannot reach upwards; internal/quadlet fills
// the template in and checks what comes out.
package quadlet

import _ "embed" // the template

// Runtime is the template of resultity-runtime.container, for text/template.
//
//go:embed resultity-runtime.container
var Runtime string
