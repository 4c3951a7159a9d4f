package openai

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestCheck(t *testing.T) {
	nested := func(n int) string { return strings.Repeat(`[{"a":`, n/2) + "1" + strings.Repeat(`}]`, n/2) }
	names := func(n int, last string) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `"%d":{"x":0},`, i)
		}
		return "{" + b.String() + last + ":1}"
	}
	for _, ok := range []string{
		`0`, ` null `, `""`, `[]`, `{}`, `[ ]`, `{ }`, `[1,2, 3 ]`, `"é\u00e9\\\/\"\n"`, `"\ud83d\ude80"`, `"\ud83d\ude80\ud83d\ude80"`,
		`{"a":{"a":1},"b":{"a":1}}`, `{"a":1,"A":2}`, `[{"a":1},{"a":1}]`, nested(maxDepth), names(1000, `"x"`), names(70, `"x"`),
	} {
		if err := check([]byte(ok)); err != nil {
			t.Errorf("%.60s: %v", ok, err)
		}
	}
	for _, tt := range []struct {
		bad  string
		want error // nil: a name twice
	}{
		{``, errJSON}, {` `, errJSON}, {`{`, errJSON}, {`[1,]`, errJSON}, {`{"a":1,}`, errJSON}, {`1 2`, errJSON}, {`'a'`, errJSON}, {`NaN`, errJSON},
		{`01`, errJSON}, {"\"a\nb\"", errJSON}, {`"\x41"`, errJSON}, {"\xef\xbb\xbf{}", errJSON},
		{"\"\xff\"", errUTF8}, {"\"\xed\xa0\xbd\"", errUTF8}, {"\"\xc0\xaf\"", errUTF8},
		{`"\ud83d"`, errUTF8}, {`"\ude80\ud83d"`, errUTF8}, {`"\ud83d\n"`, errUTF8}, {`"\ud83d\ud83d"`, errUTF8}, {`"\ud83dx\ude80"`, errUTF8}, {`{"\ud83d":1}`, errUTF8},
		{nested(maxDepth + 2), errDepth}, {strings.Repeat("[", 9999) + strings.Repeat("]", 9999), errDepth},
		{strings.Repeat("[", 1<<20), errJSON},
		{`{"a":1,"a":1}`, nil}, {`{"a":1,"\u0061":1}`, nil}, {`[{"b":{"a":1,"c":[],"a":1}}]`, nil},
		{names(15, `"3"`), nil}, {names(16, `"3"`), nil}, {names(17, `"16"`), nil}, {names(1000, `"999"`), nil}, {names(1000, `"0"`), nil},
	} {
		err := check([]byte(tt.bad))
		if err == nil || tt.want != nil && !errors.Is(err, tt.want) || tt.want == nil && !strings.Contains(err.Error(), "twice") {
			t.Errorf("%.60s: got %v, want %v", tt.bad, err, tt.want)
		}
	}
}

// FuzzJSON compares this reader with encoding/json.
func FuzzJSON(f *testing.F) {
	for _, s := range []string{`{"a" : [1,-2.5e3,null , true], "b":{"\u0063":"\ud83d\ude80\t"} }`, `[[],{},"",0]`, `"\\\""`, `12`, `{"a":1,"a":2}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		err := check(b)
		var want any
		dec := json.NewDecoder(bytes.NewReader(b))
		dec.UseNumber()
		if jerr := dec.Decode(&want); jerr != nil || !json.Valid(b) {
			if err == nil {
				t.Fatalf("took %q, which encoding/json refuses: %v", b, jerr)
			}
			return
		}
		if err != nil {
			return
		}
		if got := build(trim(b)); !reflect.DeepEqual(got, want) {
			t.Fatalf("%q: got %#v, want %#v", b, got, want)
		}
	})
}

// build makes of a value what encoding/json makes of it.
func build(v []byte) any {
	switch typeName(v) {
	case "null":
		return nil
	case "a boolean":
		return v[0] == 't'
	case "a string":
		if s := string(unescape(nil, v)); s != string(plain(v)) {
			panic("plain and unescape differ")
		}
		return string(plain(v))
	case "an array":
		a := []any{}
		for e := range elements(v) {
			a = append(a, build(e))
		}
		return a
	case "an object":
		o := map[string]any{}
		for name, e := range members(v) {
			o[string(name)] = build(e)
		}
		return o
	}
	return json.Number(v)
}

func FuzzQuote(f *testing.F) {
	f.Add("a\"\\\b\f\n\r\t\x00\x1f\x7f</é🚀\u2028")
	f.Fuzz(func(t *testing.T, s string) {
		if !utf8.ValidString(s) {
			return
		}
		q := quote(nil, s)
		var back string
		if err := json.Unmarshal(q, &back); err != nil || back != s {
			t.Fatalf("%q became %s and then %q (%v)", s, q, back, err)
		}
		if bytes.ContainsAny(q, "\r\n") {
			t.Fatalf("%s would end a line of an event stream", q)
		}
	})
}
