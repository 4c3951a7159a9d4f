package rules

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// boundName is how a bound is called: how much there may be at most, or for how long
// somebody waits. Whoever writes one calls it so, at the top of its package, and not
// by a number in the middle of a function.
var boundName = regexp.MustCompile(`^((max|Max|most|Most)([A-Z]\w*)?|(\w*[a-z0-9])?(Most|Limit|Timeout|Patience|Wait)|limit|timeout|patience|wait)$`)

// unexceeded are bounds that no test has to exceed, with the reason. That it is hard
// is none.
var unexceeded = map[string]string{
	"session.tcpUserTimeout":      "the number of a socket's option, as the kernel calls it",
	"network/store.maxTried":      "what blocks.Mend is given to spend; the tests of store/blocks give it less, and see it spent",
	"network/store.reopenTimeout": "nothing is known that has JetStream hang as it starts; what would follow is the next try, as after any other failure",
}

// A bound that nothing exceeds in a test may not be one. So a test of its package names
// it, to go one beyond it and see what gives way; by its name, since a number of the
// test's own would not follow it. An exported one may be named in any test. That
// the test does go beyond is for who writes it, and who reads it.
func TestBoundsAreExceeded(t *testing.T) {
	bounds, named := bounds(t)
	left := map[string]bool{}
	for name := range unexceeded {
		left[name] = true
	}
	for _, b := range bounds {
		if named[b] {
			continue
		}
		if unexceeded[b] == "" {
			t.Errorf("no test names %s: have one go beyond it, or say in unexceeded why none has to", b)
		}
		delete(left, b)
	}
	for name := range left {
		t.Errorf("unexceeded has %s, which is no bound, or which a test names", name)
	}
}

// bounds returns the bounds of all programs, as package and name, and which of them
// tests name.
func bounds(t *testing.T) (list []string, named map[string]bool) {
	t.Helper()
	helpers := []string{"deploy/deploytest", "model/modeltest", "network/nodetest", "bridge/internal/sealtest"}
	named = map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "build" || d.Name() == "node_modules") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		pkg := strings.TrimPrefix(filepath.ToSlash(dir), "internal/")
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		switch {
		case strings.HasSuffix(path, "_test.go"):
			names(f, pkg, named)
		case strings.HasPrefix(dir, "test") || slices.Contains(helpers, pkg):
		default:
			list = append(list, boundsOf(f, pkg)...)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(list) < 200 {
		t.Errorf("%d bounds: has the way to write them changed?", len(list))
	}
	slices.Sort(list)
	return list, named
}

// boundsOf returns the bounds at the top of a file.
func boundsOf(f *ast.File, pkg string) (list []string) {
	for _, decl := range f.Decls {
		g, ok := decl.(*ast.GenDecl)
		if !ok {
			continue
		}
		for _, spec := range g.Specs {
			v, ok := spec.(*ast.ValueSpec)
			if !ok {
				continue
			}
			for i, name := range v.Names {
				if i < len(v.Values) && boundName.MatchString(name.Name) && isNumber(v.Values[i]) {
					list = append(list, pkg+"."+name.Name)
				}
			}
		}
	}
	return list
}

// isNumber reports whether an expression is a number or a time, as far as can be seen
// of it alone: made of numbers, names, operators and conversions.
func isNumber(e ast.Expr) bool {
	switch e := e.(type) {
	case *ast.BasicLit:
		return e.Kind == token.INT || e.Kind == token.FLOAT
	case *ast.Ident, *ast.SelectorExpr:
		return true
	case *ast.ParenExpr:
		return isNumber(e.X)
	case *ast.UnaryExpr:
		return e.Op != token.AND && isNumber(e.X)
	case *ast.BinaryExpr:
		return isNumber(e.X) && isNumber(e.Y)
	case *ast.CallExpr:
		return len(e.Args) == 1 && isNumber(e.Args[0])
	}
	return false
}

// names adds to named what a test of a package names, of its own and of others.
func names(f *ast.File, pkg string, named map[string]bool) {
	imported := map[string]string{} // package by its name in the file
	for _, i := range f.Imports {
		path, err := strconv.Unquote(i.Path.Value)
		other, ours := strings.CutPrefix(path, module+"/internal/")
		if err != nil || !ours {
			continue
		}
		name := other[strings.LastIndexByte(other, '/')+1:]
		if i.Name != nil {
			name = i.Name.Name
		}
		imported[name] = other
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.SelectorExpr:
			if x, ok := n.X.(*ast.Ident); ok && imported[x.Name] != "" {
				named[imported[x.Name]+"."+n.Sel.Name] = true
				return false
			}
			return true
		case *ast.Ident:
			named[pkg+"."+n.Name] = true
		}
		return true
	})
}
