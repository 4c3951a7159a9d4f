// Package spelling owns the check that a JSON document reads the same to everybody.
//
// The rule it keeps: what is signed, or shown as a proof, does not say one thing to
// this code and another to a reader in another language.
package spelling

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
)

// Check fails unless every reader of b sees what was decoded from it into v. Go's
// decoder takes names in any case, those that v has not, and the last of several;
// others take them exactly, or the first. Decoded without Go's tolerance, b must be
// the same tree as v, and not larger: a repeated name would make it so.
func Check(b []byte, v any) error {
	printed, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, b); err != nil {
		return err
	}
	if bytes.Equal(compact.Bytes(), printed) { // as we print it ourselves, which is the rule
		return nil
	}
	got, want := tree(compact.Bytes()), tree(printed)
	if compact.Len() != len(printed) || !reflect.DeepEqual(got, want) {
		return errors.New("a field is repeated, missing, unknown, or spelt in another way")
	}
	return nil
}

// tree decodes without types, numbers as they are written.
func tree(b []byte) any {
	var v any
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		return err
	}
	return v
}
