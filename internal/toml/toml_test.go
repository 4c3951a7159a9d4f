package toml

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	k, err := Parse([]byte("a = 1\n[b]\nc = \"x\"\n"), ".")
	if err != nil || k.String("b.c") != "x" || k.Int("a") != 1 {
		t.Errorf("%v, %v", k, err)
	}
	for text, want := range map[string]string{
		"a = 1\n\n[b]\nc = \"x\n": "line 4, column 7: ",
		"a = 1\nb 2\n":            "line 2, column 3: ",
		"a = 1\nb = \n":           "line 2, ",
		"a = 1\n[b\n":             "line 2, ",
		"a = 1\na = 2\n":          "key a is already defined",
	} {
		if k, err := Parse([]byte(text), "."); err == nil || !strings.Contains(err.Error(), want) || k != nil {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}
