package image

import (
	"testing"

	"github.com/resultity/node/internal/snapshot"
)

// ErrPolicy of the stand-in for Podman.
var ErrStandIn = errPolicy

// MaxPayload bounds each text beside a signature.
const MaxPayload = maxPayload

// StandIn is Podman without its storage, for tests from outside.
type StandIn = standIn

// NewStandIn returns one whose policy is in dir.
func NewStandIn(t *testing.T, dir string) *StandIn {
	return &standIn{t: t, dir: dir, stored: map[snapshot.ImageRef]bool{}}
}

// StoresIndex makes what ref came to be stored with it.
func (p *standIn) StoresIndex(ref snapshot.ImageRef) { p.index = ref }
