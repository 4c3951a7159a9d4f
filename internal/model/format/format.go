// Package format looks into the files of a model, before an engine does: whether
// they are what their names say, whether all parts are there, and whether one of
// them would have an engine run code.
//
// The rule it keeps: nothing in a file is believed. Each length is held against what
// is left of the file and against a bound before anything is read or kept for it.
package format

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
)

// Why a file is refused.
var (
	ErrMagic   = errors.New("file is not of the format that its name says")
	ErrHeader  = errors.New("header of the file is damaged or out of bounds")
	ErrTensors = errors.New("tensors are not where the header says")
	ErrParts   = errors.New("parts of the model do not belong together")
	ErrCode    = errors.New("model asks for code to be run")
)

// File is one file of a model.
type File struct {
	Path string
	Size int64
	io.ReaderAt
}

// Check looks into all files of one model.
func Check(files []File) error {
	has := map[string]bool{}
	for _, f := range files {
		has[f.Path] = true
	}
	for _, f := range files {
		var err error
		switch {
		case strings.HasSuffix(f.Path, ".gguf"):
			err = checkGGUF(f)
		case strings.HasSuffix(f.Path, ".safetensors"):
			err = checkSafetensors(f)
		case strings.HasSuffix(f.Path, ".safetensors.index.json"):
			err = checkIndex(f, has)
		case strings.HasSuffix(f.Path, ".json"):
			err = checkJSON(f)
		}
		if err != nil {
			return fmt.Errorf("file %s: %w", f.Path, err)
		}
	}
	return nil
}

const (
	maxJSON  = 256 << 20 // bytes; the largest tokenizers have a tenth of it
	maxIndex = 32 << 20  // bytes; it is kept as a whole, and the largest have some 10 MiB
	maxDepth = 64
)

// checkJSON refuses what makes libraries load code that comes with a model, or from
// elsewhere. Tokens of a vocabulary may have the same names: their values are
// numbers.
func checkJSON(f File) error {
	if f.Size > maxJSON {
		return fmt.Errorf("%w: %d bytes of JSON, at most %d", ErrHeader, f.Size, maxJSON)
	}
	dec := json.NewDecoder(io.NewSectionReader(f, 0, f.Size))
	dec.UseNumber()
	if err := walk(dec, 0); err != nil {
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return fmt.Errorf("%w: something follows the JSON value", ErrMagic)
	}
	return nil
}

// walk reads one value.
func walk(dec *json.Decoder, depth int) error {
	t, err := dec.Token()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMagic, err)
	}
	d, ok := t.(json.Delim)
	if !ok {
		return nil
	}
	if depth > maxDepth {
		return fmt.Errorf("%w: JSON deeper than %d", ErrHeader, maxDepth)
	}
	for dec.More() {
		if d == '{' {
			k, err := dec.Token()
			if err != nil {
				return fmt.Errorf("%w: %w", ErrMagic, err)
			}
			switch k {
			case "auto_map", "trust_remote_code", "custom_pipelines", "custom_generate":
				if err := checkFlag(dec, k.(string)); err != nil {
					return err
				}
				continue
			}
		}
		if err := walk(dec, depth+1); err != nil {
			return err
		}
	}
	if _, err = dec.Token(); err != nil { // the closing bracket
		return fmt.Errorf("%w: %w", ErrMagic, err)
	}
	return nil
}

// checkFlag reads the value of a key that can ask for code.
func checkFlag(dec *json.Decoder, key string) error {
	t, err := dec.Token()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMagic, err)
	}
	switch v := t.(type) {
	case nil, json.Number:
		return nil
	case bool:
		if !v {
			return nil
		}
	case json.Delim:
		if v == '{' && !dec.More() {
			if _, err := dec.Token(); err != nil {
				return fmt.Errorf("%w: %w", ErrMagic, err)
			}
			return nil
		}
	}
	return fmt.Errorf("%w: it has %s", ErrCode, key)
}

// checkIndex checks that an index of safetensors files names files that are there.
func checkIndex(f File, has map[string]bool) error {
	if f.Size > maxIndex {
		return fmt.Errorf("%w: an index of %d bytes, at most %d", ErrHeader, f.Size, maxIndex)
	}
	if err := checkJSON(f); err != nil {
		return err
	}
	var index struct {
		Weights map[string]string `json:"weight_map"`
	}
	if err := json.NewDecoder(io.NewSectionReader(f, 0, f.Size)).Decode(&index); err != nil {
		return fmt.Errorf("%w: %w", ErrMagic, err)
	}
	if len(index.Weights) == 0 {
		return fmt.Errorf("%w: the index names no file", ErrParts)
	}
	for tensor, name := range index.Weights {
		if !strings.HasSuffix(name, ".safetensors") || !has[path.Join(path.Dir(f.Path), name)] || path.Base(name) != name {
			return fmt.Errorf("%w: the index has tensor %.80q in %.80q, which is not there", ErrParts, tensor, name)
		}
	}
	return nil
}
