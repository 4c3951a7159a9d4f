package digest

import (
	"errors"
	"strings"
	"testing"
)

func TestParseAcceptsOneSpelling(t *testing.T) {
	d := Of([]byte("hello"))
	got, err := Parse(d.String())
	if err != nil || got != d {
		t.Fatalf("Parse(%q) = %v, %v", d.String(), got, err)
	}
	for _, s := range []string{
		"", "sha256:", d.Hex(), "sha512:" + d.Hex(), "SHA256:" + d.Hex(), " " + d.String(), d.String() + " ", d.String() + "\n",
		"sha256:" + strings.ToUpper(d.Hex()), d.String()[:70], d.String() + "0", "sha256:" + strings.Repeat("g", 64), "sha256:" + strings.Repeat("0", 64),
	} {
		if v, err := Parse(s); err == nil {
			t.Errorf("Parse(%q) = %v, want an error", s, v)
		}
	}
}

func TestCheck(t *testing.T) {
	d := Of([]byte("hello"))
	if err := d.CheckReader(strings.NewReader("hello")); err != nil {
		t.Error(err)
	}
	for _, s := range []string{"", "hellO", "hello ", "hell"} {
		if err := d.CheckReader(strings.NewReader(s)); !errors.Is(err, ErrMismatch) {
			t.Errorf("CheckReader(%q) = %v, want ErrMismatch", s, err)
		}
		if err := d.Check([]byte(s)); !errors.Is(err, ErrMismatch) {
			t.Errorf("Check(%q) = %v, want ErrMismatch", s, err)
		}
	}
}
