package wire

import (
	"encoding/json"
	"fmt"

	"github.com/resultity/node/internal/evm"
)

// A statement is a JSON body with a signature of its own, so that it can be kept
// and shown to others when the session that carried it is long over. The domain
// says what kind it is, so that none can be taken for another; network and node
// stand in the body.
type statement struct {
	Body      []byte        `json:"body"`      // the exact bytes that are signed
	Signature evm.Signature `json:"signature"` // over keccak(domain ‖ Body)
}

const (
	orderDomain = "resultity.v1 order\n"
	logsDomain  = "resultity.v1 logs\n"

	maxStatement = 8 << 10 // bytes of a body
)

func makeStatement(key signer, domain string, v any) (statement, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return statement{}, err
	}
	if len(body) > maxStatement {
		return statement{}, fmt.Errorf("%w: a statement of %d bytes, at most %d", ErrTooLarge, len(body), maxStatement)
	}
	sig, err := key.Sign(evm.Keccak([]byte(domain), body))
	return statement{body, sig}, err
}

// open decodes the body into v and returns its signer, whom the caller compares
// with who it should be. The signature is looked at first.
func (s *statement) open(domain string, v any) (evm.Address, error) {
	if len(s.Body) == 0 || len(s.Body) > maxStatement {
		return evm.Address{}, fmt.Errorf("%w: a statement of %d bytes, at most %d", ErrMalformed, len(s.Body), maxStatement)
	}
	who, err := evm.Recover(evm.Keccak([]byte(domain), s.Body), s.Signature)
	if err != nil {
		return evm.Address{}, malformed(err) // whoever sent it: it is not the frame's
	}
	return who, strict(s.Body, v)
}
