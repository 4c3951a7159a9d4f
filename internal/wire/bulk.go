package wire

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"github.com/resultity/node/internal/receipt"
)

// This file writes and reads chunks and results, which are nearly all that
// passes, and can be large. What it writes is the JSON that package json would
// write, but a reader finds the end of every part without looking at each byte
// several times. What it reads is that spelling and no other.

var errSpelling = errors.New("not spelt as the protocol says")

func (c *Chunk) append(b []byte) []byte {
	b = append(b, `{"job":"`...)
	b = hex.AppendEncode(b, c.Job[:])
	b = append(b, `","offset":`...)
	b = strconv.AppendInt(b, c.Offset, 10)
	b = append(b, `,"data":"`...)
	b = base64.StdEncoding.AppendEncode(b, c.Data)
	return append(b, `"}`...)
}

func (c *Chunk) parse(b []byte) (err error) {
	t := text{rest: b}
	t.want(`{"job":"`)
	job := t.plain()
	t.want(`","offset":`)
	c.Offset = int64(t.number())
	t.want(`,"data":"`)
	data := t.plain()
	t.want(`"}`)
	if t.bad || len(t.rest) > 0 {
		return errSpelling
	}
	if c.Job, err = receipt.ParseJobID(string(job)); err != nil {
		return err
	}
	c.Data, err = parseBase64(data)
	return err
}

// AppendJSON appends the one spelling of a result.
func (r *Result) AppendJSON(b []byte) ([]byte, error) {
	b = append(b, `{"job":"`...)
	b = hex.AppendEncode(b, r.Job[:])
	b = append(b, '"')
	for _, s := range []struct{ name, value string }{{"code", string(r.Code)}, {"message", r.Message}} {
		if s.value == "" {
			continue
		}
		value, err := json.Marshal(s.value)
		if err != nil {
			return nil, err
		}
		b = fmt.Appendf(b, `,"%s":%s`, s.name, value)
	}
	if len(r.Response) > 0 {
		b = append(b, `,"response":"`...)
		b = base64.StdEncoding.AppendEncode(b, r.Response)
		b = append(b, '"')
	}
	if r.Receipt != nil {
		var err error
		if b, err = r.Receipt.AppendJSON(append(b, `,"receipt":`...)); err != nil {
			return nil, err
		}
	}
	return append(b, '}'), nil
}

// ParseJSON reads what [Result.AppendJSON] writes, into an empty result. It also
// checks the receipt's signature: [receipt.Signed] has no other way to be read.
func (r *Result) ParseJSON(b []byte) (err error) {
	b, ok := bytes.CutSuffix(b, []byte("}"))
	t := text{rest: b, bad: !ok}
	t.want(`{"job":"`)
	job := t.plain()
	t.want(`"`)
	if t.skip(`,"code":`) {
		r.Code = Code(t.str())
		t.bad = t.bad || r.Code == ""
	}
	if t.skip(`,"message":`) {
		r.Message = t.str()
		t.bad = t.bad || r.Message == ""
	}
	var response []byte
	if t.skip(`,"response":"`) {
		response = t.plain()
		t.want(`"`)
		t.bad = t.bad || len(response) == 0
	}
	signed := t.skip(`,"receipt":`)
	if t.bad || !signed && len(t.rest) > 0 {
		return errSpelling
	}
	if r.Job, err = receipt.ParseJobID(string(job)); err != nil {
		return err
	}
	if len(response) > 0 {
		if r.Response, err = parseBase64(response); err != nil {
			return err
		}
	}
	if signed {
		r.Receipt = new(receipt.Signed)
		return r.Receipt.UnmarshalJSON(t.rest)
	}
	return nil
}

// str takes a JSON string.
func (t *text) str() (s string) {
	n := 1
	for n < len(t.rest) && t.rest[n] != '"' {
		if t.rest[n] == '\\' {
			n++
		}
		n++
	}
	if n >= len(t.rest) || json.Unmarshal(t.rest[:n+1], &s) != nil {
		t.bad = true
		return ""
	}
	t.rest = t.rest[n+1:]
	return s
}

// parseBase64 reads the one spelling: padded, without line breaks, and with
// nothing in the bits that count for nothing.
func parseBase64(b []byte) ([]byte, error) {
	enc := base64.StdEncoding.Strict()
	out := make([]byte, enc.DecodedLen(len(b)))
	n, err := enc.Decode(out, b)
	if err == nil && enc.EncodedLen(n) != len(b) { // the decoder passes line breaks over
		err = errSpelling
	}
	return out[:n], err
}
