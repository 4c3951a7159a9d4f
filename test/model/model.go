// Package model holds tiny-chat, a real language model of two million
// parameters, as test data, with prompts whose answers at temperature 0 are
// known to the letter.
//
// The bytes never change under one name: a test ties them to [SHA256], and
// whatever serves, fetches or runs the model may compare against it. A model
// trained anew has another hash and needs other answers.
//
// It is for tests and the demo only; no shipped program may import it.
package model

import (
	"bytes"
	"crypto/rand"
	_ "embed" // the model and its prompts
	"encoding/json"
)

const (
	// Name is the model's name, as requests ask for it.
	Name = "tiny-chat"

	// FileName is the name of the model's one file.
	FileName = "tiny-chat-q8_0.gguf"

	// SHA256 is the hash of the bytes that [GGUF] returns, in lower-case hex.
	SHA256 = "41bf282b6fdabec77d03e9a488e885cbd49223ed8e30919a84f22815a9d42df3"

	// ContextTokens is how many tokens prompt and answer may have together.
	ContextTokens = 1024
)

// A Prompt is one user message that opens a chat, and the model's whole answer
// to it.
type Prompt struct {
	User   string `json:"user"`
	Answer string `json:"answer"`
}

//go:embed tiny-chat-q8_0.gguf
var gguf []byte

//go:embed prompts.json
var promptsJSON []byte

var prompts = mustParse(promptsJSON)

// GGUF returns the model file. The slice is the caller's own.
func GGUF() []byte { return bytes.Clone(gguf) }

// Random returns size bytes, at least 24, that are a GGUF file by their header, and
// different each time. No engine can do anything with them.
func Random(size int) []byte {
	b := make([]byte, size)
	_, _ = rand.Read(b) // it never fails: it ends the program instead
	copy(b, "GGUF\x03\x00\x00\x00")
	clear(b[8:24]) // no tensors and no metadata
	return b
}

// Prompts returns the known prompts, always in the same order: short ones
// first, long answers (up to 391 tokens, good for streams) last. The slice is
// the caller's own.
//
// The answers hold for llama.cpp's server at temperature 0 with the chat
// template in the file, no system message and room for 400 tokens. They were
// the same for every batch size, number of threads and slots, and x86-64 code
// path that was tried.
func Prompts() []Prompt { return append([]Prompt(nil), prompts...) }

// mustParse panics on bad JSON: the input is part of the program.
func mustParse(b []byte) []Prompt {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	var ps []Prompt
	if err := dec.Decode(&ps); err != nil {
		panic("model: prompts.json: " + err.Error())
	}
	return ps
}
