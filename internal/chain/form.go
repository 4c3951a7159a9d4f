package chain

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// maxDepth is how deep values are nested. Metadata needs five levels.
const maxDepth = 16

// form checks that raw begins with a JSON object with signed and signatures and
// nothing else, in which no name comes twice. encoding/json takes the last of two,
// takes names that differ in case for the same, and merges maps: what one program
// verifies could be something else to the next. It refuses by itself what is no
// JSON, what follows the object, and a version that is no integer.
func form(raw []byte, most int) error {
	if len(raw) > most {
		return fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(raw), most)
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	top, err := value(dec, 1)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if len(top) != 2 || !top["signed"] || !top["signatures"] {
		return fmt.Errorf("%w: want signed and signatures, and nothing else", ErrMalformed)
	}
	return nil
}

// value reads a value and returns the names in it if it is an object.
func value(dec *json.Decoder, depth int) (map[string]bool, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("more than %d values in each other", maxDepth)
	}
	t, err := dec.Token()
	if err != nil {
		return nil, err
	}
	switch t {
	case json.Delim('['):
		for dec.More() {
			if _, err := value(dec, depth+1); err != nil {
				return nil, err
			}
		}
		_, err := dec.Token()
		return nil, err
	case json.Delim('{'):
		names, folded := map[string]bool{}, map[string]bool{}
		for dec.More() {
			t, err := dec.Token()
			if err != nil {
				return nil, err
			}
			name := t.(string) // the decoder takes no other name
			fold := strings.ToLower(strings.ToUpper(name))
			if folded[fold] {
				return nil, fmt.Errorf("the name %.80q comes twice", name)
			}
			names[name], folded[fold] = true, true
			if _, err := value(dec, depth+1); err != nil {
				return nil, err
			}
		}
		_, err := dec.Token()
		return names, err
	}
	return nil, nil
}
