package openai

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// This file reads JSON from strangers. The rules are:
//
//   - encoding/json decides what the grammar is; on top of it, text must be
//     valid UTF-8 also where it is written as \u escapes, nesting is bounded,
//     and an object has no name twice, since two parsers may then see two
//     different values (this one checks, the engine obeys).
//   - Names are compared exactly. encoding/json folds case, engines do not.
//   - Values stay bytes until somebody asks, so that a request reaches the
//     engine as it was written.

// maxDepth bounds nesting of arrays and objects.
const maxDepth = 64

var (
	errUTF8  = errors.New("not valid UTF-8")
	errJSON  = errors.New("not valid JSON")
	errDepth = fmt.Errorf("nested deeper than %d levels", maxDepth)
)

// check says whether b is one JSON value that keeps the rules. The other
// functions of this file take only bytes that passed it.
func check(b []byte) error {
	if !utf8.Valid(b) {
		return errUTF8
	}
	if !json.Valid(b) {
		return errJSON
	}
	var room [16][]byte
	c := checker{b: b, names: room[:0]}
	_, err := c.value(space(b, 0), 0)
	return err
}

// checker walks a value of valid grammar.
type checker struct {
	b     []byte
	names [][]byte // of the objects that are open, innermost last
}

func (c *checker) value(i, depth int) (end int, err error) {
	switch c.b[i] {
	case '"':
		return c.str(i)
	case '{', '[':
		if depth == maxDepth {
			return 0, errDepth
		}
		return c.composite(i, depth+1)
	default:
		return skip(c.b, i), nil
	}
}

func (c *checker) composite(i, depth int) (end int, err error) {
	object := c.b[i] == '{'
	mine := len(c.names)
	var many map[string]bool // takes over from names when there are many
	for i = space(c.b, i+1); c.b[i] != '}' && c.b[i] != ']'; {
		if object {
			end, err := c.str(i)
			if err != nil {
				return 0, err
			}
			name := plain(c.b[i:end])
			if c.twice(name, mine, &many) {
				return 0, fmt.Errorf("the name %.40q twice in one object", name)
			}
			i = space(c.b, space(c.b, end)+1) // the colon
		}
		if i, err = c.value(i, depth); err != nil {
			return 0, err
		}
		if i = space(c.b, i); c.b[i] == ',' {
			i = space(c.b, i+1)
		}
	}
	c.names = c.names[:mine]
	return i + 1, nil
}

// twice notes a name of the object whose names begin at mine. It stays cheap
// for an object of a million names.
func (c *checker) twice(name []byte, mine int, many *map[string]bool) bool {
	own := c.names[mine:]
	if len(own) < 16 {
		for _, n := range own {
			if bytes.Equal(n, name) {
				return true
			}
		}
		c.names = append(c.names, name)
		return false
	}
	if *many == nil {
		*many = make(map[string]bool)
		for _, n := range own {
			(*many)[string(n)] = true
		}
	}
	if (*many)[string(name)] {
		return true
	}
	(*many)[string(name)] = true
	return false
}

// str refuses the escapes of half a character.
func (c *checker) str(i int) (end int, err error) {
	end = skip(c.b, i)
	for s := c.b[i:end]; ; {
		k := bytes.IndexByte(s, '\\')
		if k < 0 {
			return end, nil
		}
		if s = s[k+1:]; s[0] != 'u' {
			s = s[1:]
			continue
		}
		r := hex4(s[1:])
		s = s[5:]
		if utf16.IsSurrogate(r) {
			if s[0] != '\\' || s[1] != 'u' || utf16.DecodeRune(r, hex4(s[2:])) == utf8.RuneError {
				return 0, errUTF8
			}
			s = s[6:]
		}
	}
}

// space returns the place of the first byte from i on that is not white space.
func space(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\n' || b[i] == '\t' || b[i] == '\r') {
		i++
	}
	return i
}

// skip returns the end of the value that begins at i.
func skip(b []byte, i int) int {
	depth := 0
	for ; i < len(b); i++ {
		switch b[i] {
		case '"':
			for i++; b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
			if depth == 0 {
				return i + 1
			}
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth == 0 {
				return i + 1
			}
			if depth < 0 { // the end of what holds a number or literal
				return i
			}
		case ',', ' ', '\n', '\t', '\r':
			if depth == 0 {
				return i
			}
		}
	}
	return i
}

// trim returns b without the white space around it.
func trim(b []byte) []byte { return bytes.Trim(b, " \n\t\r") }

// typeName says in words what a value is.
func typeName(v []byte) string {
	switch v[0] {
	case 'n':
		return "null"
	case 't', 'f':
		return "a boolean"
	case '"':
		return "a string"
	case '[':
		return "an array"
	case '{':
		return "an object"
	}
	return "a number"
}

func isNull(v []byte) bool { return v[0] == 'n' }

// members yields the names and values of an object.
func members(v []byte) iter.Seq2[[]byte, []byte] {
	return func(yield func(name, value []byte) bool) {
		for i := space(v, 1); v[i] != '}'; {
			end := skip(v, i)
			name := plain(v[i:end])
			i = space(v, space(v, end)+1)
			end = skip(v, i)
			if !yield(name, v[i:end]) {
				return
			}
			if i = space(v, end); v[i] == ',' {
				i = space(v, i+1)
			}
		}
	}
}

// elements yields the values of an array.
func elements(v []byte) iter.Seq[[]byte] {
	return func(yield func(value []byte) bool) {
		for i := space(v, 1); v[i] != ']'; {
			end := skip(v, i)
			if !yield(v[i:end]) {
				return
			}
			if i = space(v, end); v[i] == ',' {
				i = space(v, i+1)
			}
		}
	}
}

// plain returns the text of a string, without a copy where nothing is escaped.
func plain(v []byte) []byte {
	if s := v[1 : len(v)-1]; bytes.IndexByte(s, '\\') < 0 {
		return s
	}
	return unescape(make([]byte, 0, len(v)), v)
}

// unescape appends the text of a string to dst.
func unescape(dst, v []byte) []byte {
	for s := v[1 : len(v)-1]; ; {
		k := bytes.IndexByte(s, '\\')
		if k < 0 {
			return append(dst, s...)
		}
		dst = append(dst, s[:k]...)
		e := s[k+1]
		s = s[k+2:]
		switch e {
		case 'b':
			e = '\b'
		case 'f':
			e = '\f'
		case 'n':
			e = '\n'
		case 'r':
			e = '\r'
		case 't':
			e = '\t'
		case 'u':
			r := hex4(s)
			s = s[4:]
			if utf16.IsSurrogate(r) {
				r = utf16.DecodeRune(r, hex4(s[2:]))
				s = s[6:]
			}
			dst = utf8.AppendRune(dst, r)
			continue
		}
		dst = append(dst, e)
	}
}

func hex4(s []byte) rune {
	n, err := strconv.ParseUint(string(s[:4]), 16, 16)
	if err != nil {
		return utf8.RuneError
	}
	return rune(n)
}

// quote appends text as a JSON string.
func quote[T ~string | ~[]byte](dst []byte, text T) []byte {
	return append(escape(append(dst, '"'), text), '"')
}

// escape appends text as the inside of a JSON string. There is one spelling:
// only what must be escaped is, in the shortest form.
func escape[T ~string | ~[]byte](dst []byte, text T) []byte {
	const digits = "0123456789abcdef"
	from := 0
	for i := 0; i < len(text); i++ {
		c := text[i]
		if c >= ' ' && c != '"' && c != '\\' {
			continue
		}
		dst = append(dst, text[from:i]...)
		from = i + 1
		switch c {
		case '"', '\\':
			dst = append(dst, '\\', c)
		case '\b':
			dst = append(dst, '\\', 'b')
		case '\f':
			dst = append(dst, '\\', 'f')
		case '\n':
			dst = append(dst, '\\', 'n')
		case '\r':
			dst = append(dst, '\\', 'r')
		case '\t':
			dst = append(dst, '\\', 't')
		default:
			dst = append(dst, '\\', 'u', '0', '0', digits[c>>4], digits[c&15])
		}
	}
	return append(dst, text[from:]...)
}
