package main

import (
	"strings"
	"testing"
)

// What `go test -json` said of a package with a bit of everything.
const transcript = `{"Action":"run","Test":"TestA"}
{"Action":"run","Test":"TestA/far/too_long"}
{"Action":"output","Test":"TestA/far/too_long","Output":"    a_test.go:7: expected: too-long: 9; got: too long: 9 bytes\n"}
{"Action":"run","Test":"TestA/empty"}
{"Action":"output","Test":"TestA/empty","Output":"    a_test.go:9: accepted\n"}
{"Action":"pass","Test":"TestA/far/too_long"}
{"Action":"fail","Test":"TestA/empty"}
{"Action":"fail","Test":"TestA"}
{"Action":"run","Test":"TestAB"}
{"Action":"output","Test":"TestAB","Output":"    a_test.go:7: one: a b: expected: refused; got: no b: c\n"}
{"Action":"output","Test":"TestAB","Output":"    a_test.go:7: two: expected: taken; got: 1\n"}
{"Action":"pass","Test":"TestAB"}
{"Action":"run","Test":"TestSilent"}
{"Action":"pass","Test":"TestSilent"}
{"Action":"run","Test":"TestBoth"}
{"Action":"run","Test":"TestBoth/one"}
{"Action":"output","Test":"TestBoth","Output":"    a_test.go:9: expected: x; got: y\n"}
{"Action":"output","Test":"TestBoth/one","Output":"    a_test.go:8: expected: v; got: w\n"}
{"Action":"pass","Test":"TestBoth/one"}
{"Action":"pass","Test":"TestBoth"}
{"Action":"run","Test":"TestSkipped"}
{"Action":"skip","Test":"TestSkipped"}
{"Action":"run","Test":"TestCleanup"}
{"Action":"run","Test":"TestCleanup/one"}
{"Action":"output","Test":"TestCleanup/one","Output":"    a_test.go:8: expected: a; got: b\n"}
{"Action":"pass","Test":"TestCleanup/one"}
{"Action":"fail","Test":"TestCleanup"}
{"Action":"run","Test":"TestPanics"}
{"Action":"run","Test":"TestPanics/one"}
{"Action":"output","Output":"panic: test timed out\n"}
{"Action":"fail"}
`

func TestRows(t *testing.T) {
	res, err := read(strings.NewReader(transcript))
	if err != nil {
		t.Fatal(err)
	}
	for test, want := range map[string]string{
		"TestA":       "p TestA/empty|refused|NOT SO|failed; p TestA/far/too long|too-long: 9|too long: 9 bytes|ok",
		"TestAB":      "p TestAB/one: a b|refused|no b: c|ok; p TestAB/two|taken|1|ok",
		"TestSilent":  "p TestSilent|refused|NOT SAID|failed",
		"TestBoth":    "p TestBoth|x|y|ok; p TestBoth/one|v|w|ok",
		"TestSkipped": "p TestSkipped|refused|NOT RUN|failed",
		"TestCleanup": "p TestCleanup|refused|NOT SO|failed; p TestCleanup/one|a|b|ok",
		"TestPanics":  "p TestPanics/one|refused|NOT SO|failed",
		"TestNone":    "p TestNone|refused|NOT RUN|failed",
	} {
		var got []string
		for _, r := range res.rows(suite{pkg: "p", test: test, shows: "refused"}) {
			got = append(got, r.name+"|"+r.expected+"|"+r.got+"|"+map[bool]string{false: "ok", true: "failed"}[r.failed])
		}
		if s := strings.Join(got, "; "); s != want {
			t.Errorf("%s:\ngot  %s\nwant %s", test, s, want)
		}
	}
}

// Whether each test exists is for test/rules to say, which is run more often.
func TestCases(t *testing.T) {
	suites, err := parse(cases)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, s := range suites {
		if s.who == "" || seen[s.pkg+s.test] {
			t.Errorf("%s %s: twice, or by nobody", s.pkg, s.test)
		}
		seen[s.pkg+s.test] = true
	}
	if _, err := parse("internal/tuf TestAttacks refused"); err == nil {
		t.Error("a line that is none is passed over")
	}
}
