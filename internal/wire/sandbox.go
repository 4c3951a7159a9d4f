package wire

import (
	"errors"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/sandbox/record"
)

// Sandbox is a record of the sandbox that a node works in, before the first
// result that names it.
type Sandbox struct {
	Sandbox *record.Signed `json:"sandbox"`
}

func (m *Sandbox) check() error {
	if m.Sandbox == nil {
		return errors.New("no record")
	}
	return nil
}

// SandboxAck says that the network has stored a record.
type SandboxAck struct {
	Digest digest.Digest `json:"digest"`
}
