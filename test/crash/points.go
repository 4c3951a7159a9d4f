// Package crash kills the agent and the network service with SIGKILL at every
// fail point that their code has, on real hosts, while clients ask, and looks at
// what the next start makes of it.
//
// The rule it keeps: the list of points comes from the code. A point that nobody
// reaches fails the walk, and a place that makes something durable without a
// point fails test/rules.
package crash

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Point is a place at which a process may die.
type Point struct {
	Name    string // as RESULTITY_FAILPOINT's file has it
	Network bool   // of the network service; else of the agent
	At      string // file:line
}

// innerCall passes points of its own, where many callers meet: each caller dies
// there, too.
type innerCall struct {
	dir    string   // of the callers; empty for all
	call   string   // as it is written
	points []string // in the order in which they are passed
}

var inner = []innerCall{
	{"", "durable.WriteFile", []string{"durable.write.synced", "durable.write.renamed"}},
	{"internal/state", "s.commit", []string{"state.frame.written", "state.frame.synced"}},
}

// call is a call in the code.
type call struct {
	name string // as it is written
	lit  string // its first argument, if that is a string
	args int
	pos  token.Pos
}

// function is one of the functions of the node and of the network service.
type function struct {
	dir, name string
	calls     []call
}

// ours reports whether the code of a directory ends up in one of the programs
// that are walked.
func ours(dir string) bool {
	for _, other := range []string{"internal/bridge", "internal/failpoint", "internal/deploy/deploytest", "internal/network/nodetest", "internal/journal/catalog", "internal/ctl", "internal/signer/cli"} {
		if dir == other || strings.HasPrefix(dir, other+"/") {
			return false
		}
	}
	return true
}

// parse reads the code below internal.
func parse(root string) (*token.FileSet, map[string][]*ast.File, error) {
	fset, files := token.NewFileSet(), map[string][]*ast.File{}
	err := filepath.WalkDir(filepath.Join(root, "internal"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if dir := filepath.ToSlash(filepath.Dir(rel)); ours(dir) {
			src, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			f, err := parser.ParseFile(fset, rel, src, 0)
			if err != nil {
				return err
			}
			files[dir] = append(files[dir], f)
		}
		return nil
	})
	return fset, files, err
}

// functions lists the functions of a package with their calls in the order of
// the text.
func functions(dir string, files []*ast.File) (list []function) {
	for _, f := range files {
		for _, d := range f.Decls {
			decl, ok := d.(*ast.FuncDecl)
			if !ok || decl.Body == nil {
				continue
			}
			fn := function{dir: dir, name: decl.Name.Name}
			if decl.Recv != nil {
				fn.name = Spelled(decl.Recv.List[0].Type) + "." + fn.name
			}
			ast.Inspect(decl.Body, func(n ast.Node) bool {
				if c, ok := n.(*ast.CallExpr); ok {
					k := call{name: Spelled(c.Fun), args: len(c.Args), pos: c.Pos()}
					if len(c.Args) > 0 {
						if lit, ok := c.Args[0].(*ast.BasicLit); ok && lit.Kind == token.STRING {
							k.lit, _ = strconv.Unquote(lit.Value) // the parser has read it
						}
					}
					fn.calls = append(fn.calls, k)
				}
				return true
			})
			slices.SortStableFunc(fn.calls, func(a, b call) int { return int(a.pos - b.pos) })
			list = append(list, fn)
		}
	}
	return list
}

// Spelled is an expression as it is written, as far as it is made of names: those of
// calls have no arguments, generic ones no types.
func Spelled(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return Spelled(e.X) + "." + e.Sel.Name
	case *ast.StarExpr:
		return Spelled(e.X)
	case *ast.CallExpr:
		return Spelled(e.Fun) + "()"
	case *ast.IndexExpr:
		return Spelled(e.X)
	}
	return "_"
}

const here = "failpoint.Here"

// Points lists the points of the code in root, the top of the repository. A
// point about a message is one for each type that the package's side sends; one
// before a call of inner is one more for each point in there. Names are checked.
func Points(root string) ([]Point, error) {
	fset, files, err := parse(root)
	if err != nil {
		return nil, err
	}
	var points []Point
	seen := map[string]string{}
	for dir, parsed := range files {
		for _, f := range functions(dir, parsed) {
			last := ""
			for _, c := range f.calls {
				at := fset.Position(c.pos)
				add := func(name string) {
					points = append(points, Point{name, strings.HasPrefix(dir, "internal/network") || dir == "internal/publish", fmt.Sprintf("%s:%d", at.Filename, at.Line)})
				}
				if i := slices.IndexFunc(inner, func(i innerCall) bool { return i.call == c.name && (i.dir == "" || i.dir == dir) }); i >= 0 {
					if last == "" {
						return nil, fmt.Errorf("%s: no fail point before %s", at, c.name)
					}
					for _, p := range inner[i].points {
						add(last + ">" + p)
					}
				}
				if c.name != here {
					continue
				}
				switch parts := strings.Split(c.lit, "."); {
				case len(parts) != 3 || slices.Contains(parts, "") || strings.Trim(c.lit, "abcdefghijklmnopqrstuvwxyz.") != "":
					return nil, fmt.Errorf("%s: %q is not package.what.when", at, c.lit)
				case parts[0] != filepath.Base(dir):
					return nil, fmt.Errorf("%s: %q is not of package %s", at, c.lit, filepath.Base(dir))
				case seen[c.lit] != "":
					return nil, fmt.Errorf("%s: %q is at %s, too", at, c.lit, seen[c.lit])
				}
				seen[c.lit] = at.String()
				last = c.lit
				switch {
				case c.args > 1:
					for _, t := range sent(files, dir) {
						add(c.lit + " *wire." + t)
					}
				case !slices.ContainsFunc(inner, func(i innerCall) bool { return slices.Contains(i.points, c.lit) }):
					add(c.lit)
				}
			}
		}
	}
	slices.SortFunc(points, func(a, b Point) int { return strings.Compare(a.Name, b.Name) })
	return points, nil
}

// sent lists the messages that a side sends, by the direction that each has.
func sent(files map[string][]*ast.File, dir string) (types []string) {
	own := "ToNetwork"
	if strings.HasPrefix(dir, "internal/network") {
		own = "ToNode"
	}
	for _, f := range files["internal/wire"] {
		for _, d := range f.Decls {
			decl, ok := d.(*ast.FuncDecl)
			if !ok || decl.Name.Name != "direction" || decl.Recv == nil {
				continue
			}
			if r, ok := decl.Body.List[0].(*ast.ReturnStmt); ok && Spelled(r.Results[0]) == own {
				types = append(types, Spelled(decl.Recv.List[0].Type))
			}
		}
	}
	return types
}

// durable matches calls that make something durable or tell somebody something,
// by directory and by how they are written.
var durable = []struct{ dir, call *regexp.Regexp }{
	{regexp.MustCompile(``), regexp.MustCompile(`^durable\.(WriteFile|SyncDir)$|^os\.Rename$|\.root\.Rename$|\.Sync$|\.(WriteMessage|WriteControl|NextWriter)$`)},
	{regexp.MustCompile(`^internal/state$`), regexp.MustCompile(`\.(rename|sync|commit)$`)},
	{regexp.MustCompile(`^internal/network/store$`), regexp.MustCompile(`^db\.js\.Publish$|^db\.\w+\.(Put|Create|Update|Purge|Delete|DeleteMsg)$`)},
}

// Bare lists the functions, as package.Type.Func, that make something durable or
// tell somebody something and have no fail point.
func Bare(root string) ([]string, error) {
	_, files, err := parse(root)
	if err != nil {
		return nil, err
	}
	var bare []string
	for dir, parsed := range files {
		for _, f := range functions(dir, parsed) {
			has := func(match func(call) bool) bool { return slices.ContainsFunc(f.calls, match) }
			for _, d := range durable {
				if d.dir.MatchString(dir) && has(func(c call) bool { return d.call.MatchString(c.name) }) && !has(func(c call) bool { return c.name == here }) {
					bare = append(bare, strings.TrimPrefix(dir, "internal/")+"."+f.name)
					break
				}
			}
		}
	}
	slices.Sort(bare)
	return bare, nil
}
