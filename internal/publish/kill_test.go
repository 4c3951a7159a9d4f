package publish

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// The test's program is a publisher, too, that goes on until it is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("PUBLISH_WITHOUT_END"); dir != "" {
		publishWithoutEnd(dir)
	}
	os.Exit(m.Run())
}

func publishWithoutEnd(dir string) {
	must := func(err error) {
		if err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
	}
	var t testing.T // for what cannot fail
	for n := 0; ; n++ {
		must(Publish(dir, config(&t, n%50)))
		fmt.Println("published")
		if err := rotate(dir, Rotation{SignWith: rootKeys(dir, 1, 2), Renew: online[n%3:]}); err == nil || !strings.Contains(err.Error(), "another root was published") {
			must(err) // two ceremonies at once: one counts
		}
		fmt.Println("rotated")
		_, err := Refresh(dir)
		must(err)
	}
}

// Publishers that are killed at any instant, while another one works, leave what
// nodes can use and the next publisher can go on from.
func TestKill(t *testing.T) {
	dir := published(t, Options{})
	c := node(t, dir)
	for round := range 5 {
		var publishers [2]*exec.Cmd
		for i := range publishers {
			cmd := exec.CommandContext(t.Context(), os.Args[0])
			cmd.Env = append(os.Environ(), "PUBLISH_WITHOUT_END="+dir)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			publishers[i] = cmd
			// Some way into its work, and then anywhere.
			lines := bufio.NewScanner(out)
			for range 1 + round%3 {
				lines.Scan()
				if l := lines.Text(); strings.HasPrefix(l, "failed:") {
					t.Fatal(l)
				}
			}
		}
		time.Sleep(time.Duration(round) * 1700 * time.Microsecond)
		for _, cmd := range publishers {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // it was killed
		}
		if _, err := c.Refresh(t.Context()); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if _, err := node(t, dir).Refresh(t.Context()); err != nil {
			t.Fatalf("round %d: a new node: %v", round, err)
		}
		if _, err := Check(dir); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	if err := Publish(dir, config(t, 99)); err != nil {
		t.Fatal(err)
	}
	sees(t, c, config(t, 99))
	for name := range tree(t, dir) {
		if strings.Contains(name, ".tmp") {
			t.Errorf("%s was left", name)
		}
	}
}

// What nodes would refuse is not published, and not even written down for holders
// to sign.
func TestNothingIsProposedThatNodesRefuse(t *testing.T) {
	dir := published(t, Options{})
	before := tree(t, dir)
	var many []Public
	for n := range 400 { // more than fit a root
		k, err := MakeKey(filepath.Join(t.TempDir(), "k.pem"), nil)
		if err != nil {
			t.Fatal(err)
		}
		many = append(many, k.Public(fmt.Sprint("holder-", n)))
	}
	present, err := open(dir)
	if err != nil {
		t.Fatal(err)
	}
	present.unlock()
	again := *present.root.Signed.Keys[present.root.Signed.Roles["root"].KeyIDs[0]]
	again = metadata.Key{Type: again.Type, Scheme: again.Scheme, Value: metadata.KeyVal{PublicKey: strings.ToUpper(again.Value.PublicKey)}}
	id, err := again.ID()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]Change{
		"more keys than a root may have bytes": {Add: many},
		"a key in another spelling":            {Add: []Public{{"again", &again, id}}},
		"a lifetime of a hundred years":        {Lifetime: 100 * 365 * 24 * time.Hour},
		"a lifetime of nothing":                {Lifetime: -time.Hour},
	} {
		if p, err := Propose(dir, c); err == nil {
			t.Errorf("%s: proposed %d bytes", name, len(p.Next))
		}
		unchanged(t, dir, before)
	}
}
