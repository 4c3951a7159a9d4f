// Package toml reads the programs' configuration files.
//
// The rule it keeps: an error about a file's form names the line.
package toml

import (
	"errors"
	"fmt"

	"github.com/knadh/koanf/parsers/toml/v2"
	"github.com/knadh/koanf/providers/rawbytes"
	"github.com/knadh/koanf/v2"
)

// Parse reads a file's text. Names of keys are joined by delim.
func Parse(raw []byte, delim string) (*koanf.Koanf, error) {
	k := koanf.New(delim)
	err := k.Load(rawbytes.Provider(raw), toml.Parser())
	var at interface{ Position() (row, column int) }
	if errors.As(err, &at) {
		row, column := at.Position()
		err = fmt.Errorf("line %d, column %d: %w", row, column, err)
	}
	if err != nil {
		return nil, err
	}
	return k, nil
}
