package rules

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/resultity/node"

const root = "../.."

// pkg is what `go list` says of a package.
type pkg struct {
	ImportPath string
	Name       string
	Dir        string
	GoFiles    []string
	Imports    []string
}

func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Name,Dir,GoFiles,Imports", "./...")
	cmd.Dir = root
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var pkgs []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

// Levels of the node's packages. A package imports only from levels below its
// own, so that edges (network, Podman, systemd, engine, disk) never meet.
var levels = [][]string{
	{"failpoint"}, // everywhere
	{"digest", "durable", "evm", "gate", "journal", "plainhttp", "spelling", "toml", "version"}, // leaves
	{"chunk"},
	{"receipt", "receiptlog", "binding", "determinism", "bridge/contract"}, // pure: no I/O, no clock
	{"sandbox/record"},                       //
	{"wire", "snapshot"},                     //
	{"openai", "quadlet", "config", "chain"}, //
	{"model/fetch", "model/share", "model/format", "model/signature"},
	{"identity", "signer", "tuf", "session", "image", "model", "podman", "systemd", "runtime", "state", "generation", "order", "spool", "preflight", "support", "sandbox/book"}, // edges
	{"control", "sandbox", "hardware"},
	{"work", "deploy"}, // order
	{"agent", "ctl", "signer/cli"},
}

// outside of the levels are programs of their own, what generates files, and
// helpers of tests.
var outside = []string{"network", "publish", "bridge", "journal/catalog", "deploy/deploytest", "model/modeltest"}

func level(path string) int {
	name, ok := strings.CutPrefix(path, module+"/internal/")
	if !ok {
		return -1
	}
	return slices.IndexFunc(levels, func(l []string) bool { return slices.Contains(l, name) })
}

func TestImportDirection(t *testing.T) {
	found := map[string]bool{}
	for _, p := range list(t) {
		name, internal := strings.CutPrefix(p.ImportPath, module+"/internal/")
		found[name] = true
		from := level(p.ImportPath)
		if from < 0 {
			if internal && !slices.ContainsFunc(outside, func(dir string) bool { return name == dir || strings.HasPrefix(name, dir+"/") }) {
				t.Errorf("%s has no level: give it one", p.ImportPath)
			}
			continue
		}
		for _, i := range p.Imports {
			if to := level(i); to >= from {
				t.Errorf("%s (level %d) imports %s (level %d): imports go downward only", p.ImportPath, from, i, to)
			}
			if strings.HasPrefix(i, module+"/internal/network") || strings.HasPrefix(i, module+"/test/") || strings.HasPrefix(i, module+"/cmd/") {
				t.Errorf("%s imports %s: a node knows nothing of the network service or the tests", p.ImportPath, i)
			}
		}
	}
	for _, l := range levels {
		for _, name := range l {
			if !found[name] {
				t.Errorf("levels name %s, which does not exist", name)
			}
		}
	}
}

// Packages that decide without looking at the world.
var pure = []string{"chunk", "sandbox/record", "spelling", "receipt", "receiptlog", "binding", "determinism", "wire", "snapshot", "openai", "bridge/contract", "quadlet", "chain"}

func TestPurePackagesStayPure(t *testing.T) {
	bad := map[string]string{"os": "files", "net": "network", "os/exec": "programs", "log": "logging", "log/slog": "logging"}
	for _, p := range list(t) {
		if !slices.Contains(pure, strings.TrimPrefix(p.ImportPath, module+"/internal/")) {
			continue
		}
		for _, i := range p.Imports {
			if why := bad[i]; why != "" {
				t.Errorf("%s imports %s: a pure package has nothing to do with %s", p.ImportPath, i, why)
			}
		}
		for _, f := range p.GoFiles {
			src, err := os.ReadFile(filepath.Join(p.Dir, f))
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(src), "time.Now()") {
				t.Errorf("%s/%s asks for the time: a pure package is told", p.ImportPath, f)
			}
		}
	}
}

// Some dependencies have one user each, so that replacing one touches one place.
func TestSoleUsers(t *testing.T) {
	only := map[string]string{
		"github.com/ethereum/go-ethereum/crypto":           "evm",
		"github.com/gorilla/websocket":                     "session",
		"github.com/containers/podman/v5/pkg/bindings":     "podman",
		"github.com/containers/podman/v5/pkg/systemd":      "quadlet",
		"github.com/coreos/go-systemd/v22/dbus":            "systemd",
		"github.com/theupdateframework/go-tuf/v2/metadata": "chain tuf snapshot",
	}
	for _, p := range list(t) {
		name, ours := strings.CutPrefix(p.ImportPath, module+"/internal/")
		if !ours || strings.HasPrefix(name, "network") || name == "publish" {
			continue
		}
		for _, i := range p.Imports {
			for prefix, users := range only {
				if (i == prefix || strings.HasPrefix(i, prefix+"/")) && !slices.Contains(strings.Fields(users), name) {
					t.Errorf("%s imports %s, which is for %s alone", p.ImportPath, i, users)
				}
			}
		}
	}
}

func TestBridgeUsesOnlyTheStandardLibrary(t *testing.T) {
	cmd := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", "./cmd/resultity-bridge")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range strings.Fields(string(out)) {
		if !strings.HasPrefix(i, module+"/") {
			t.Errorf("the bridge depends on %s; it runs beside other people's code and stays small", i)
		}
	}
}

func TestOneDocCommentPerPackage(t *testing.T) {
	for _, p := range list(t) {
		var docs []string
		for _, f := range p.GoFiles {
			parsed, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, f), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if parsed.Doc != nil {
				docs = append(docs, f)
			}
		}
		if len(docs) != 1 && len(p.GoFiles) > 0 {
			t.Errorf("%s: package comment in %v, want exactly one", p.ImportPath, docs)
		}
	}
}

func TestMainStaysSmall(t *testing.T) {
	mains, err := filepath.Glob(root + "/cmd/*/main.go")
	if err != nil || len(mains) == 0 {
		t.Fatal(mains, err)
	}
	for _, m := range mains {
		src, err := os.ReadFile(m)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(src), "\n"); n > 100 {
			t.Errorf("%s has %d lines; a main constructs and runs", m, n)
		}
	}
}

var depLine = regexp.MustCompile(`(?m)^([a-z0-9.]+/[^ ]+): .{10,}$`)

// Each direct dependency is listed with its reason, and nothing is replaced.
func TestDependenciesHaveReasons(t *testing.T) {
	mod, err := os.ReadFile(root + "/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if regexp.MustCompile(`(?m)^(replace|exclude)\b`).Match(mod) {
		t.Error("go.mod replaces or excludes a module; users of `go install` would not get it")
	}
	reasons, err := os.ReadFile("dependencies.txt")
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{}
	for _, m := range depLine.FindAllStringSubmatch(string(reasons), -1) {
		listed[m[1]] = true
	}
	for _, m := range regexp.MustCompile(`(?m)^\t(\S+) v\S+$`).FindAllStringSubmatch(string(mod), -1) {
		if !listed[m[1]] {
			t.Errorf("dependencies.txt gives no reason for %s", m[1])
		}
		delete(listed, m[1])
	}
	for m := range listed {
		t.Errorf("dependencies.txt names %s, which is no direct dependency", m)
	}
}

// Prompts and answers are the users' own; a log that cannot name them cannot
// leak them. The keys are those under which one would be tempted to log them.
func TestNoTextInLogs(t *testing.T) {
	tempting := regexp.MustCompile(`^(prompt|content|messages?|answer|output|body|request|response|text|data)$`)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "build" || d.Name() == "node_modules") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || !slices.Contains([]string{"Debug", "Info", "Warn", "Error", "DebugContext", "InfoContext", "WarnContext", "ErrorContext"}, sel.Sel.Name) {
				return true
			}
			for _, a := range call.Args[min(1, len(call.Args)):] {
				if lit, ok := a.(*ast.BasicLit); ok && lit.Kind == token.STRING && tempting.MatchString(strings.Trim(lit.Value, `"`)) {
					t.Errorf("%s: logs a field %s", fset.Position(lit.Pos()), lit.Value)
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// named are tests as documents name them: a package, and one or more of its tests.
var named = regexp.MustCompile("(?m)(?:`|^|hosts )((?:internal|test)/[a-z0-9/]+)`? (Test\\w+(?:, Test\\w+)*)")

// Documents say which test shows each claim. A name that no test has any more
// would be a claim without one.
func TestNamedTestsExist(t *testing.T) {
	for file, least := range map[string]int{"README.md": 20, "policy/threats.md": 70, "test/attack/cases.txt": 100} {
		text, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			t.Fatal(err)
		}
		found := named.FindAllSubmatch(text, -1)
		if len(found) < least {
			t.Errorf("%s names tests in %d places; has its form changed?", file, len(found))
		}
		for _, m := range found {
			for _, name := range strings.Split(string(m[2]), ", ") {
				if !testsOf(t, string(m[1]))[name] {
					t.Errorf("%s names %s of %s, which there is not", file, name, m[1])
				}
			}
		}
	}
}

// A threat whose row has no test would be a claim, and one with several a story.
func TestThreatsHaveOneTestEach(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "policy/threats.md"))
	if err != nil {
		t.Fatal(err)
	}
	cases, err := os.ReadFile(filepath.Join(root, "test/attack/cases.txt"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "|---") || strings.HasPrefix(line, "| tries to |") {
			continue
		}
		if m := named.FindAllStringSubmatch(line, -1); len(m) != 1 || strings.Contains(m[0][2], ",") {
			t.Errorf("want one test in %s", line)
		} else if !strings.Contains(string(cases), m[0][1]+" "+m[0][2]+":") {
			t.Errorf("make attack does not run %s %s, which shows a threat: add it to cases.txt", m[0][1], m[0][2])
		}
	}
}

var testFunc = regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`)

// testsOf returns the names of a package's tests.
func testsOf(t *testing.T, dir string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]bool{}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range testFunc.FindAllSubmatch(b, -1) {
			tests[string(m[1])] = true
		}
	}
	return tests
}
