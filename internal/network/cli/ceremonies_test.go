package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/publish"
	"github.com/resultity/node/internal/tuf"
)

// The test's program is the command, too, if it is called so.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "resultity-network" {
		os.Exit(Main(context.Background(), os.Args[1:], os.Stdout, os.Stderr, "test"))
	}
	os.Exit(m.Run())
}

const phrase = "correct horse battery staple"

// answers are what the person at the keyboard says to each question.
var answers = map[string]string{
	"Passphrase of":    phrase,
	"The same again: ": phrase,
	"Sign it? (yes) ":  "yes",
}

// keyboard answers the questions in what is written to it.
type keyboard struct {
	mu   sync.Mutex // guards what follows
	text bytes.Buffer
	said map[string]int
	in   io.Writer
}

func (k *keyboard) Write(b []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.text.Write(b)
	for question, answer := range answers {
		for ; k.said[question] < strings.Count(k.text.String(), question); k.said[question]++ {
			if _, err := io.WriteString(k.in, answer+"\n"); err != nil {
				return 0, err
			}
		}
	}
	return len(b), nil
}

// office is the directory in which steps are done.
type office struct {
	t   *testing.T
	dir string
}

func newOffice(t *testing.T) *office {
	t.Helper()
	o := &office{t, t.TempDir()}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(o.dir, ".bin"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(o.dir, ".bin", "resultity-network")); err != nil {
		t.Fatal(err)
	}
	return o
}

// sh runs a block of the document and returns what is on the screen.
func (o *office) sh(block string) (string, error) {
	o.t.Helper()
	cmd := exec.CommandContext(o.t.Context(), "sh", "-eu", "-c", block)
	cmd.Dir = o.dir
	// A program with the race detector sleeps for a second at its end, by default.
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(o.dir, ".bin")+":"+os.Getenv("PATH"), "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	in, err := cmd.StdinPipe()
	if err != nil {
		o.t.Fatal(err)
	}
	k := &keyboard{in: in, said: map[string]int{}}
	cmd.Stdout, cmd.Stderr = k, k
	err = cmd.Run()
	return k.text.String(), err
}

func (o *office) must(block string) string {
	o.t.Helper()
	out, err := o.sh(block)
	if err != nil {
		o.t.Fatalf("%s\n%v\n%s", block, err, out)
	}
	return out
}

func (o *office) file(name string) []byte {
	o.t.Helper()
	raw, err := os.ReadFile(filepath.Join(o.dir, name))
	if err != nil {
		o.t.Fatal(err)
	}
	return raw
}

// configure writes the configuration, of which each version is another.
func (o *office) configure(version int) {
	o.t.Helper()
	raw, err := os.ReadFile(filepath.Join(o.dir, "mynet/keys/message.key"))
	if err != nil {
		o.t.Fatal(err)
	}
	key, err := evm.ParseKey(strings.TrimSpace(string(raw)))
	if err != nil {
		o.t.Fatal(err)
	}
	c := nodetest.Config(o.t, key.Address())
	c.Limits.Tokens = 100 + version
	if err := os.WriteFile(filepath.Join(o.dir, "mynet/config.json"), nodetest.JSON(o.t, c), 0o600); err != nil {
		o.t.Fatal(err)
	}
}

// node follows the network from a root.
func (o *office) node(root []byte, cache string) *tuf.Client {
	o.t.Helper()
	c, err := tuf.New(tuf.Config{Dir: cache, URL: "https://mynet.example/", Root: root, Client: &http.Client{Transport: served{publish.Handler(filepath.Join(o.dir, "mynet"))}}})
	if err != nil {
		o.t.Fatal(err)
	}
	return c
}

type served struct{ http.Handler }

func (s served) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w.Result(), nil
}

type section struct {
	title  string
	blocks []string
}

// steps reads the document.
func steps(t *testing.T) (list []section) {
	t.Helper()
	raw, err := os.ReadFile("../../../policy/ceremonies.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range regexp.MustCompile(`(?m)^## `).Split(string(raw), -1)[1:] {
		title, text, _ := strings.Cut(part, "\n")
		s := section{title: title}
		for _, m := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(text, -1) {
			s.blocks = append(s.blocks, m[1])
		}
		list = append(list, s)
	}
	if len(list) < 8 {
		t.Fatalf("%d ceremonies in the document", len(list))
	}
	return list
}

// The document's steps, as they are written there, with nodes that follow: one
// with the first root, and one that begins with the newest that is handed out.
func TestCeremonies(t *testing.T) {
	o := newOffice(t)
	var first *tuf.Client
	var last string
	for i, s := range steps(t) {
		for n, block := range s.blocks {
			if _, err := os.Stat(filepath.Join(o.dir, "mynet")); err == nil {
				o.configure(i)
			}
			t.Logf("%s, step %d:\n%s", s.title, n+1, o.must(block))
		}
		root := o.file("stick/root.json")
		if first == nil {
			first = o.node(root, t.TempDir())
		}
		fresh, err := o.node(root, t.TempDir()).Refresh(t.Context())
		if err != nil {
			t.Fatalf("%s: a new node: %v", s.title, err)
		}
		if strings.Contains(s.title, "stolen") && i == len(steps(t))-1 {
			if _, err := first.Refresh(t.Context()); !errors.Is(err, tuf.ErrUnsigned) {
				t.Errorf("%s: a node with the old root: %v, want ErrUnsigned", s.title, err)
			}
			if kept, err := first.Last(); err != nil || kept.Digest().Hex() != last {
				t.Errorf("%s: and keeps %v, %v", s.title, kept, err)
			}
		} else if snap, err := first.Refresh(t.Context()); err != nil || snap.Digest() != fresh.Digest() {
			t.Fatalf("%s: the first node: %v, %v", s.title, snap, err)
		}
		last = fresh.Digest().Hex()
		if out, err := o.sh("resultity-network check --dir mynet"); err != nil {
			t.Errorf("%s: %v\n%s", s.title, err, out)
		}
	}
	// What is worth stealing is encrypted, and no command has printed it.
	for _, name := range []string{"anna/anna.pem", "anna/targets-2.pem", "dora/dora.pem"} {
		if raw := o.file(name); !bytes.Contains(raw, []byte("ENCRYPTED")) {
			t.Errorf("%s is not encrypted", name)
		}
	}
	if exposed, err := publish.Exposed(filepath.Join(o.dir, "mynet")); err != nil || len(exposed) != 0 {
		t.Errorf("within reach of the service: %v, %v", exposed, err)
	}
}

// What goes wrong in a ceremony is named, and nothing is published.
func TestCeremoniesRefuse(t *testing.T) {
	o := newOffice(t)
	o.must(`
mkdir anna ben eve
for k in anna/anna ben/ben eve/eve anna/targets; do resultity-network root key --no-passphrase $k.pem; done
resultity-network init --dir mynet --name mynet --chain-id 1 --root-threshold 2 --root-holder anna/anna.pub --root-holder ben/ben.pub --targets-public anna/targets.pub --out first.proposal
resultity-network root sign --key anna/anna.pem first.proposal
resultity-network root sign --key ben/ben.pem first.proposal
resultity-network root publish --dir mynet first.proposal first.*.sig
cp mynet/repository/metadata/1.root.json root.json
resultity-network root new --dir mynet --out next.proposal
resultity-network root sign --trusted root.json --key anna/anna.pem next.proposal
resultity-network root new --dir mynet --add eve/eve.pub --out other.proposal
resultity-network root sign --trusted root.json --key ben/ben.pem other.proposal
resultity-network init --dir evenet --name evenet --chain-id 1 --root-threshold 1 --root-holder eve/eve.pub --targets-public anna/targets.pub --out eve/first.proposal
resultity-network root sign --key eve/eve.pem eve/first.proposal
resultity-network root publish --dir evenet eve/first.proposal eve/first.*.sig
resultity-network root new --dir evenet --add ben/ben.pub --out eve/next.proposal
`)
	id := map[string]string{}
	for _, who := range []string{"anna", "ben", "eve"} {
		p, err := publish.ReadPublic(filepath.Join(o.dir, who, who+".pub"))
		if err != nil {
			t.Fatal(err)
		}
		id[who] = p.ID()[:8]
	}
	// A proposal whose contents were changed after Anna had signed.
	var p publish.Proposal
	if err := json.Unmarshal(o.file("next.proposal"), &p); err != nil {
		t.Fatal(err)
	}
	p.Next = bytes.Replace(p.Next, []byte(`"threshold": 2`), []byte(`"threshold": 1`), 1)
	raw, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(o.dir, "changed.proposal"), raw, 0o600); err != nil {
		t.Fatal(err)
	}
	const all = "echo taken > anna/taken.pub; find mynet/repository mynet/keys anna -type f -print0 | sort -z | xargs -0 sha256sum"
	before := o.must(all)
	for _, tc := range []struct{ step, want string }{
		{"root publish --dir mynet next.proposal", "0 of the 2 signatures that root 1 asks for are there; 2 more of: "},
		{"root publish --dir mynet next.proposal next." + id["anna"] + ".sig", "1 of the 2 signatures that root 1 asks for are there; 1 more of: " + id["ben"]},
		{"root publish --dir mynet next.proposal next." + id["anna"] + ".sig next." + id["anna"] + ".sig", "1 of the 2 signatures"},
		{"root publish --dir mynet next.proposal next." + id["anna"] + ".sig other." + id["ben"] + ".sig", "is for another proposal"},
		{"root publish --dir mynet changed.proposal next." + id["anna"] + ".sig", "is for another proposal"},
		{"root publish --dir evenet next.proposal next." + id["anna"] + ".sig", "1 of the 2"},
		{"root publish --dir mynet next.proposal next.proposal", "next.proposal: "},
		{"root sign --key anna/anna.pem next.proposal", "--trusted ROOT is needed"},
		{"root sign --trusted root.json --key anna/anna.pem eve/next.proposal", "somebody wants to deceive you"},
		{"root sign --trusted root.json --key eve/eve.pem next.proposal", "is no root key"},
		{"root sign --trusted root.json --key anna/anna.pem next.proposal", "is there already"},
		{"root sign --trusted root.json --key anna/anna.pem root.json", "root.json: "},
		{"root sign --trusted root.json --key anna/anna.pub next.proposal --out x", "mode"},
		{"root new --dir mynet --out next.proposal", "is there already"},
		{"root new --dir mynet --remove ben --out x", "threshold is 2, want 1 to the number of keys, 1"},
		{"root new --dir mynet --remove carla --out x", `"carla" means 0 of the root keys`},
		{"root new --dir mynet --add anna/anna.pub --out x", "the same key is given twice"},
		{"root new --dir mynet --add anna/anna.pem --out x", "want one PEM block PUBLIC KEY"},
		{"root new --dir mynet --threshold 3 --out x", "threshold is 3"},
		{"root new --dir mynet --lifetime 200000h --out x", "lifetime is"},
		{"root new --dir mynet --renew root --out x", `no role "root"`},
		{"root key anna/anna.pem", "is there already"},
		{"root key anna/anna", "ends in .pem"},
		{"root key --no-passphrase 'anna/an na.pem'", "call the file NAME.pub after its holder"},
		{"root key --no-passphrase anna/taken.pem", "taken.pub is there already"},
		{"init --dir mynet --name mynet --chain-id 1", "holds a network already"},
	} {
		out, err := o.sh("chmod 644 anna/anna.pub; resultity-network " + tc.step)
		t.Logf("%s: expected: %s; got: %s", tc.step, tc.want, lineWith(out, tc.want))
		if err == nil || !strings.Contains(out, tc.want) {
			t.Errorf("%s: %v, want %q in\n%s", tc.step, err, tc.want, out)
		}
		if after := o.must(all); after != before {
			t.Fatalf("%s has changed something:\n%s", tc.step, after)
		}
	}
	// Who reads what it changes may say no.
	answers["Sign it? (yes) "] = "no"
	defer func() { answers["Sign it? (yes) "] = "yes" }()
	out, err := o.sh("resultity-network root sign --trusted root.json --key ben/ben.pem next.proposal")
	t.Logf("an answer of no: expected: not signed; got: %s", lineWith(out, "not signed"))
	if err == nil || !strings.Contains(out, "not signed") {
		t.Errorf("an answer of no: %v\n%s", err, out)
	}
	answers["Sign it? (yes) "] = "yes"
	// Two ceremonies at once: one of them counts.
	o.must(fmt.Sprintf("resultity-network root sign --trusted root.json --key ben/ben.pem next.proposal; resultity-network root sign --trusted root.json --key anna/anna.pem other.proposal; resultity-network root publish --dir mynet next.proposal next.%s.sig next.%s.sig", id["anna"], id["ben"]))
	out, err = o.sh(fmt.Sprintf("resultity-network root publish --dir mynet other.proposal other.%s.sig other.%s.sig", id["anna"], id["ben"]))
	t.Logf("two ceremonies at once: expected: another root was published; got: %s", lineWith(out, "another root was published"))
	if err == nil || !strings.Contains(out, "another root was published") {
		t.Errorf("the second: %v\n%s", err, out)
	}
}

// What a holder reads says what changes, and warns where it has to.
func TestReview(t *testing.T) {
	o := newOffice(t)
	o.must(`
mkdir anna ben eve mal
for k in anna/anna ben/ben eve/eve mal/mal anna/targets; do resultity-network root key --no-passphrase $k.pem; done
resultity-network init --dir mynet --name mynet --chain-id 1 --root-threshold 2 --root-holder anna/anna.pub --root-holder ben/ben.pub --targets-public anna/targets.pub --out first.proposal
resultity-network root sign --key anna/anna.pem first.proposal
resultity-network root sign --key ben/ben.pem first.proposal
resultity-network root publish --dir mynet first.proposal first.*.sig
cp mynet/repository/metadata/1.root.json root.json
`)
	for _, tc := range []struct {
		step string
		want []string
		calm bool
	}{
		{step: "", want: []string{"Root 2, to follow root 1.", "root        2 of 2"}, calm: true},
		{step: "--add eve/eve.pub", want: []string{"2 of 3 (before: 2 of 2)", "+ ", " eve"}, calm: true},
		{step: "--threshold 1", want: []string{"1 of 2 (before: 2 of 2)", "! fewer signatures suffice for root: 1 instead of 2"}},
		{step: "--remove ben --add eve/eve.pub", want: []string{"- ", " ben", " eve"}, calm: true},
		{step: "--remove ben --remove anna --add eve/eve.pub --add mal/mal.pub", want: []string{"! the new root keys alone are enough"}},
		{step: "--lifetime 24h", want: []string{"! it expires earlier"}},
		{step: "--renew timestamp", want: []string{"timestamp   1 of 1", "- ", "+ "}, calm: true},
	} {
		out := o.must("rm -f x; resultity-network root new --dir mynet --out x " + tc.step + "; resultity-network root show --trusted root.json x")
		for _, w := range tc.want {
			t.Logf("root new %s: expected: %s; got: %s", tc.step, strings.TrimSpace(w), lineWith(out, w))
			if !strings.Contains(out, w) {
				t.Errorf("%q: no %q in\n%s", tc.step, w, out)
			}
		}
		if strings.Contains(out, "!") == tc.calm {
			t.Errorf("%q warns wrongly:\n%s", tc.step, out)
		}
	}
	if out := o.must("resultity-network root show root.json"); strings.Count(out, "has signed it") != 2 || !slices.Contains(strings.Fields(out), "anna,") {
		t.Errorf("%s", out)
	}
}

// What root makes in a directory of the service's account is the account's, and the
// account does not lead root to what is root's.
func TestAsRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("only root can give files away; make test is for root, as its hosts are")
	}
	o := newOffice(t)
	if err := os.Chmod(filepath.Dir(o.dir), 0o711); err != nil { // the account's way to its directory
		t.Fatal(err)
	}
	for _, step := range []string{`
for k in anna targets; do resultity-network root key --no-passphrase $k.pem; done
mkdir -p mynet/keys mynet/backup
chown 4242:4242 mynet
echo of root > backup; ln backup mynet/keys/backup; echo of root > mynet/backup/notes
resultity-network init --dir mynet --name mynet --chain-id 1 --root-holder anna.pub --targets-public targets.pub --out first.proposal
resultity-network root sign --key anna.pem first.proposal
resultity-network root publish --dir mynet first.proposal first.*.sig
`, `
resultity-network root new --dir mynet --renew timestamp --out next.proposal
resultity-network root sign --trusted mynet/repository/metadata/1.root.json --key anna.pem next.proposal
`,
		"resultity-network root publish --dir mynet next.proposal next.*.sig",
		"resultity-network publish --dir mynet --config config.json --key targets.pem",
		"rm mynet/lock; resultity-network check --dir mynet",
		"resultity-network apikey create --dir mynet --name anna",
	} {
		if strings.Contains(step, "--config") {
			o.configure(1)
			o.must("mv mynet/config.json .; chmod 600 config.json; chown 0 config.json")
		}
		o.must(step)
		if out := o.must("find mynet ! -uid 4242 | sort"); out != "mynet/backup\nmynet/backup/notes\nmynet/keys/backup\n" {
			t.Errorf("%s\nnot the account's: %s", step, out)
		}
	}
	o.must("mkdir -m 700 roots; mv mynet/repository/targets roots; ln -s ../../roots/targets mynet/repository/targets")
	if out, err := o.sh("resultity-network publish --dir mynet --config config.json --key targets.pem"); err == nil || !strings.Contains(out, "permission denied") {
		t.Errorf("led to a directory of root's: %v %s", err, out)
	}
}

// lineWith returns the first line of out that has part.
func lineWith(out, part string) string {
	for l := range strings.Lines(out) {
		if strings.Contains(l, part) {
			return strings.TrimSpace(l)
		}
	}
	return "no such line"
}
