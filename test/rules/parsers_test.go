package rules

import (
	"bufio"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/test/crash"
)

// decodes are calls that take bytes apart.
var decodes = regexp.MustCompile(`^(json\.(Unmarshal|NewDecoder)|protojson\.Unmarshal|toml\.(Parse|Parser)|pem\.Decode|x509\.Parse\w+|encrypted\.Decrypt|keystore\.DecryptKey|` +
	`gzip\.NewReader|bufio\.New(Scanner|Reader|ReaderSize)|binary\.(Read|(Big|Little)Endian\.Uint\d+)|(hex|base64)\.[\w.]*Decode\w*|mail\.ParseAddress|mime\.ParseMediaType|http\.Read\w+|netip\.Parse\w+)$`)

// parserLine is a line of parsers.txt.
var parserLine = regexp.MustCompile(`^(\S+) (\S+): (?:(\S+) (Fuzz\w+)|- (\S.{9,}))$`)

// Whoever writes a parser says which fuzz target reaches it, or why none has to.
func TestParsersAreFuzzed(t *testing.T) {
	text, err := os.ReadFile("parsers.txt")
	if err != nil {
		t.Fatal(err)
	}
	listed, last := map[string]bool{}, ""
	for lines := bufio.NewScanner(strings.NewReader(string(text))); lines.Scan(); {
		line := lines.Text()
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		m := parserLine.FindStringSubmatch(line)
		if m == nil {
			t.Errorf("parsers.txt: %q is no line of it", line)
			continue
		}
		if line <= last {
			t.Errorf("parsers.txt: %q is out of order", line)
		}
		last = line
		listed[m[1]+" "+m[2]] = true
		if m[4] != "" && !targetsOf(t, m[3])[m[4]] {
			t.Errorf("parsers.txt: %s has no target %s", m[3], m[4])
		}
	}
	for _, name := range parsers(t) {
		if !listed[name] {
			t.Errorf("%s takes bytes apart: name its fuzz target in parsers.txt, or say why it has none", name)
		}
		delete(listed, name)
	}
	for name := range listed {
		t.Errorf("parsers.txt names %s, which takes nothing apart", name)
	}
}

var fuzzFunc = regexp.MustCompile(`(?m)^func (Fuzz\w+)\(f \*testing\.F\)`)

// targetsOf returns the names of the fuzz targets of a package below internal.
func targetsOf(t *testing.T, pkg string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, "internal", pkg, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	targets := map[string]bool{}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range fuzzFunc.FindAllSubmatch(b, -1) {
			targets[string(m[1])] = true
		}
	}
	return targets
}

// parsers lists the functions below internal that take bytes apart, as package and
// name. Helpers of tests have nobody to fear.
func parsers(t *testing.T) (list []string) {
	t.Helper()
	helpers := []string{"deploy/deploytest", "model/modeltest", "network/nodetest", "bridge/internal/sealtest", "journal/catalog"}
	top := filepath.Join(root, "internal")
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		pkg, err := filepath.Rel(top, filepath.Dir(path))
		if err != nil || slices.Contains(helpers, filepath.ToSlash(pkg)) {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		for _, decl := range f.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || fn.Body == nil {
				continue
			}
			found := false
			ast.Inspect(fn.Body, func(n ast.Node) bool {
				if c, ok := n.(*ast.CallExpr); ok && decodes.MatchString(crash.Spelled(c.Fun)) {
					found = true
				}
				return !found
			})
			if !found {
				continue
			}
			name := fn.Name.Name
			if fn.Recv != nil {
				name = crash.Spelled(fn.Recv.List[0].Type) + "." + name
			}
			list = append(list, filepath.ToSlash(pkg)+" "+name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(list)
	return slices.Compact(list)
}
