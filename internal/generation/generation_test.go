package generation

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/digest"
)

func content(n int) Content {
	return Content{
		Config: digest.Of([]byte{byte(n)}), Version: int64(n), Engine: "llamacpp", Image: "registry.example.net/x@sha256:…",
		Models: []Model{{"tiny-chat", "1", digest.Of([]byte{byte(n), 1})}},
		Unit:   fmt.Appendf(nil, "[Container]\n# %d\n", n), Proof: bytes.Repeat([]byte{byte(n)}, 1000),
	}
}

func reopen(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// run brings a generation to health, and fails the test otherwise.
func run(t *testing.T, s *Store, c Content) int {
	t.Helper()
	n, err := s.Add(c)
	ok(t, err)
	ok(t, s.Begin(n))
	_, err = s.Passed(n, []Phase{{"start", 7}})
	ok(t, err)
	return n
}

func (s *Store) states() string {
	var b strings.Builder
	v := s.View()
	for _, g := range v.Generations {
		fmt.Fprintf(&b, "%d %s; ", g.Number, g.State)
	}
	fmt.Fprintf(&b, "current %d previous %d order %d", v.Current, v.Previous, v.Order)
	return b.String()
}

func want(t *testing.T, s *Store, states string) {
	t.Helper()
	if got := s.states(); got != states {
		t.Errorf("got  %s\nwant %s", got, states)
	}
}

func TestLife(t *testing.T) {
	dir := t.TempDir()
	s := reopen(t, dir)
	want(t, s, "current 0 previous 0 order 0")
	run(t, s, content(1))
	run(t, s, content(2))
	want(t, s, "1 healthy; 2 healthy; current 2 previous 1 order 0")
	// The same is not written twice; another unit is another generation.
	if n, err := s.Add(content(2)); n != 2 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	other := content(2)
	other.Unit = []byte("another")
	if n, err := s.Add(other); n != 3 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	ok(t, s.Begin(3))
	s = reopen(t, dir)
	want(t, s, "1 healthy; 2 healthy; 3 trial; current 3 previous 2 order 0")
	back, err := s.Fail(3, "validation", "wrong answer", false, nil)
	if back != 2 || err != nil {
		t.Errorf("back to %d, %v", back, err)
	}
	// Only when the one before is up is it known whose fault that was.
	want(t, reopen(t, dir), "1 healthy; 2 healthy; 3 failed; current 2 previous 1 order 0")
	if dead, err := s.Passed(2, nil); !slices.Equal(dead, []int{3}) || err != nil {
		t.Errorf("dead %v, %v", dead, err)
	}
	s = reopen(t, dir)
	want(t, s, "1 healthy; 2 healthy; 3 dead; current 2 previous 1 order 0")
	v := s.View()
	if g := v.Get(3); g.Reason != "wrong answer" || g.Step != "validation" || g.Config != content(2).Config {
		t.Errorf("%+v", g)
	}
	proof, unit, err := s.Load(2)
	if err != nil || !bytes.Equal(proof, content(2).Proof) || !bytes.Equal(unit, content(2).Unit) {
		t.Errorf("load: %v", err)
	}
	// A dead one is written anew, should it be tried again.
	if n, err := s.Add(other); n != 4 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}

// When the one before does not come up either, nobody is convicted.
func TestExcuse(t *testing.T) {
	s := reopen(t, t.TempDir())
	run(t, s, content(1))
	n, err := s.Add(content(2))
	ok(t, err)
	ok(t, s.Begin(n))
	_, err = s.Fail(n, "start", "x", false, nil)
	ok(t, err)
	ok(t, s.Excuse())
	dead, err := s.Passed(1, nil)
	if len(dead) != 0 || err != nil {
		t.Errorf("dead %v, %v", dead, err)
	}
	want(t, s, "1 healthy; 2 failed; current 1 previous 0 order 0")
}

func TestFirstOneFails(t *testing.T) {
	s := reopen(t, t.TempDir())
	n, err := s.Add(content(1))
	ok(t, err)
	ok(t, s.Begin(n))
	if back, err := s.Fail(n, "start", strings.Repeat("x", 5000), false, nil); back != 0 || err != nil {
		t.Errorf("back to %d, %v", back, err)
	}
	want(t, s, "1 failed; current 1 previous 0 order 0")
	if v := s.View(); len(v.Get(1).Reason) != maxReason {
		t.Errorf("a reason of %d bytes", len(v.Get(1).Reason))
	}
}

func TestTrialsAreCounted(t *testing.T) {
	dir := t.TempDir()
	s := reopen(t, dir)
	n, err := s.Add(content(1))
	ok(t, err)
	for i := range Trials {
		ok(t, s.Begin(n))
		s = reopen(t, dir)
		if v := s.View(); v.Get(n).Tries != i+1 {
			t.Errorf("%d tries, want %d", v.Get(n).Tries, i+1)
		}
	}
	_, err = s.Passed(n, nil)
	ok(t, err)
	if v := s.View(); v.Get(n).Tries != 0 {
		t.Errorf("%d tries after health", v.Get(n).Tries)
	}
}

func TestOrders(t *testing.T) {
	dir := t.TempDir()
	s := reopen(t, dir)
	run(t, s, content(1))
	run(t, s, content(2))
	ok(t, s.Rollback(1, "testnet", content(2).Config))
	if err := s.Rollback(9, "testnet", digest.Digest{}); !errors.Is(err, ErrUnknown) {
		t.Errorf("roll back to nothing: %v", err)
	}
	s = reopen(t, dir)
	want(t, s, "1 healthy; 2 healthy; current 2 previous 1 order 1")
	ok(t, s.Begin(1))
	_, err := s.Passed(1, nil)
	ok(t, err)
	s = reopen(t, dir)
	want(t, s, "1 healthy; 2 healthy; current 1 previous 2 order 0")
	if v := s.View(); v.Aside != content(2).Config {
		t.Errorf("aside is %s", v.Aside)
	}
	ok(t, s.Condemn(2, "unit", "refused"))
	ok(t, s.Forward(content(2).Config))
	want(t, s, "1 healthy; 2 failed; current 1 previous 2 order 0")
	if v := s.View(); !v.Aside.IsZero() || !v.Get(2).Machine {
		t.Errorf("%+v", v)
	}
	// An order that cannot be carried out here ends.
	ok(t, s.Rollback(2, "testnet", content(3).Config))
	bare := content(2)
	bare.Unit = nil
	n, err := s.Add(bare)
	ok(t, err)
	ok(t, s.Condemn(n, "unit", "refused"))
	want(t, s, "1 healthy; 2 failed; 3 dead; current 1 previous 2 order 0")
}

func TestPrune(t *testing.T) {
	dir := t.TempDir()
	s := reopen(t, dir)
	for i := range 4 {
		run(t, s, content(i))
	}
	for i := range keepFailed + 2 {
		n, err := s.Add(content(10 + i))
		ok(t, err)
		ok(t, s.Begin(n))
		_, err = s.Fail(n, "start", "x", false, nil)
		ok(t, err)
		_, err = s.Passed(4, nil)
		ok(t, err)
	}
	_, err := s.Add(content(30))
	ok(t, err)
	ok(t, s.Prune())
	want(t, s, "3 healthy; 4 healthy; 7 dead; 8 dead; 9 dead; 10 dead; 11 dead; 12 staged; current 4 previous 3 order 0")
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 9 {
		t.Errorf("%d entries on disk, %v", len(entries), err)
	}
	ok(t, s.Prune())
	ok(t, s.Forget(4))
	want(t, reopen(t, dir), "3 healthy; 7 dead; 8 dead; 9 dead; 10 dead; 11 dead; 12 staged; current 3 previous 0 order 0")
}

var errKilled = errors.New("killed")

// A kill at any instant leaves the old state or the new one, and what is current
// is whole.
func TestKill(t *testing.T) {
	steps := []struct {
		name     string
		do       func(s *Store) error
		old, new string
	}{
		{"add", func(s *Store) error { _, err := s.Add(content(3)); return err },
			"1 healthy; 2 healthy; current 2 previous 1 order 0", "1 healthy; 2 healthy; 3 staged; current 2 previous 1 order 0"},
		{"begin", func(s *Store) error { return s.Begin(3) },
			"1 healthy; 2 healthy; 3 staged; current 2 previous 1 order 0", "1 healthy; 2 healthy; 3 trial; current 3 previous 2 order 0"},
		{"fail", func(s *Store) error { _, err := s.Fail(3, "start", "x", false, nil); return err },
			"1 healthy; 2 healthy; 3 trial; current 3 previous 2 order 0", "1 healthy; 2 healthy; 3 failed; current 2 previous 1 order 0"},
		{"convict", func(s *Store) error { _, err := s.Passed(2, nil); return err },
			"1 healthy; 2 healthy; 3 failed; current 2 previous 1 order 0", "1 healthy; 2 healthy; 3 dead; current 2 previous 1 order 0"},
		{"rollback", func(s *Store) error { return s.Rollback(1, "testnet", content(2).Config) },
			"1 healthy; 2 healthy; 3 dead; current 2 previous 1 order 0", "1 healthy; 2 healthy; 3 dead; current 2 previous 1 order 1"},
		{"forget", func(s *Store) error { return s.Forget(1) },
			"1 healthy; 2 healthy; 3 dead; current 2 previous 1 order 1", "2 healthy; 3 dead; current 2 previous 0 order 0"},
	}
	for i, st := range steps {
		for stop := 0; ; stop++ {
			dir := t.TempDir()
			s := reopen(t, dir)
			run(t, s, content(1))
			run(t, s, content(2))
			for _, before := range steps[:i] {
				ok(t, before.do(s))
			}
			count := 0
			var at string
			s.point = func(p string) error {
				if count++; count > stop {
					at = p
					return errKilled
				}
				return nil
			}
			err := st.do(s)
			s = reopen(t, dir)
			if w := s.Warnings(); len(w) > 0 {
				t.Errorf("%s, killed at %s: damage %v", st.name, at, w)
			}
			if got := s.states(); got != st.old && got != st.new || err == nil && got != st.new {
				t.Errorf("%s, killed at %q: %s", st.name, at, got)
			}
			v := s.View()
			if _, _, err := s.Load(v.Current); err != nil {
				t.Errorf("%s, killed at %q: current: %v", st.name, at, err)
			}
			for _, step := range steps[i:] { // and what was interrupted can be done again
				if got := s.states(); got == step.new {
					continue
				}
				ok(t, step.do(s))
			}
			want(t, s, steps[len(steps)-1].new)
			if err == nil {
				break
			}
		}
	}
}

// Damage is found, said, and costs no more than what is damaged.
func TestDamage(t *testing.T) {
	make3 := func(t *testing.T) string {
		dir := t.TempDir()
		s := reopen(t, dir)
		for i := range 3 {
			run(t, s, content(i))
		}
		return dir
	}
	harm := map[string]func(string) error{
		"cut":   func(f string) error { return os.Truncate(f, 10) },
		"empty": func(f string) error { return os.Truncate(f, 0) },
		"gone":  os.Remove,
		"link": func(f string) error {
			return errors.Join(os.Rename(f, f+"x"), os.Symlink("/dev/zero", f))
		},
		"grown": func(f string) error {
			return os.Truncate(f, 1+map[string]int64{"state": maxIndex, "manifest": maxManif, "proof": maxProof, "unit": maxUnit}[filepath.Base(f)])
		},
	}
	for _, i := range []int{0, 30, 80, 200, 900} {
		harm[fmt.Sprintf("bit %d", i)] = func(f string) error {
			raw, err := os.ReadFile(f)
			if err != nil {
				return err
			}
			raw[i%len(raw)] ^= 1
			return errors.Join(os.Chmod(f, 0o600), os.WriteFile(f, raw, 0o600))
		}
	}
	for name, do := range harm {
		for _, file := range []string{"state", "3/manifest", "3/proof", "3/unit"} {
			dir := make3(t)
			ok(t, errors.Join(os.Chmod(filepath.Join(dir, file), 0o600), do(filepath.Join(dir, file))))
			s := reopen(t, dir)
			v := s.View()
			if v.Get(v.Current) == nil {
				t.Fatalf("%s of %s: current is %d of %s", name, file, v.Current, s.states())
			}
			if _, _, err := s.Load(v.Current); err != nil {
				if !errors.Is(err, ErrDamaged) {
					t.Errorf("%s of %s: %v", name, file, err)
				}
				ok(t, s.Forget(v.Current)) // what its owner does then
			} else if len(s.Warnings()) == 0 {
				t.Errorf("%s of %s went unnoticed", name, file)
			}
			if v = s.View(); file != "state" && v.Current != 2 || file == "state" && v.Current != 3 {
				t.Errorf("%s of %s: %s", name, file, s.states())
			}
			if _, _, err := s.Load(v.Current); err != nil {
				t.Errorf("%s of %s: %v", name, file, err)
			}
			if n := run(t, s, content(9)); n != 4 {
				t.Errorf("%s of %s: the next is %d", name, file, n)
			}
		}
	}
}

// A state that has the right digest and makes no sense is damage, too.
// A process without descriptors learns nothing of its disk, and forgets nothing.
func TestNoDescriptors(t *testing.T) {
	dir := t.TempDir()
	s := reopen(t, dir)
	run(t, s, content(1))
	run(t, s, content(2))
	var limit syscall.Rlimit
	ok(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	none := limit
	none.Cur = 0
	ok(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none))
	_, _, loadErr := s.Load(2)
	_, manifestErr := s.manifest(2)
	_, openErr := Open(dir, time.Now)
	ok(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit))
	for _, err := range []error{loadErr, manifestErr, openErr} {
		if !errors.Is(err, syscall.EMFILE) || errors.Is(err, ErrDamaged) {
			t.Errorf("got %v", err)
		}
	}
	want(t, reopen(t, dir), "1 healthy; 2 healthy; current 2 previous 1 order 0")
}

func TestAbsurdState(t *testing.T) {
	for name, x := range map[string]index{
		"no next":       {Next: 0},
		"too many":      {Next: 1000, Records: make([]record, maxRecords+1)},
		"from tomorrow": {Next: 1, Records: []record{{7, Status{State: Healthy}}}},
		"twice":         {Next: 3, Records: []record{{1, Status{State: Healthy}}, {1, Status{State: Dead}}}},
		"no state":      {Next: 2, Records: []record{{1, Status{State: "great"}}}},
	} {
		dir := t.TempDir()
		s := reopen(t, dir)
		run(t, s, content(1))
		raw, err := seal(&x)
		ok(t, err)
		ok(t, os.WriteFile(filepath.Join(dir, "state"), raw, 0o600))
		s = reopen(t, dir)
		if len(s.Warnings()) != 1 || s.states() != "1 trial; current 1 previous 0 order 0" {
			t.Errorf("%s: %s", name, s.states())
		}
	}
	raw := []byte(`{"next":1,"current":0,"previous":0,"order":0,"aside":"","records":[],"more":1}`)
	if err := open(append([]byte(digest.Of(raw).String()+"\n"), raw...), new(index)); err == nil {
		t.Error("an unknown field is taken")
	}
}

// The largest that is written can be read.
func TestLargest(t *testing.T) {
	x := index{Next: maxNumber}
	for i := range maxRecords {
		x.Records = append(x.Records, record{i + 1, Status{State: Failed, Step: "validate", Reason: strings.Repeat("<", maxReason)}})
	}
	ok(t, x.check())
	raw, err := seal(&x)
	ok(t, err)
	if len(raw) > maxIndex {
		t.Errorf("a state of %d bytes, at most %d are read", len(raw), maxIndex)
	}
	dir := t.TempDir()
	s := reopen(t, dir)
	c := content(1)
	c.Unit = make([]byte, maxUnit)
	n := run(t, s, c)
	if _, unit, err := s.Load(n); err != nil || len(unit) != maxUnit {
		t.Errorf("a unit of %d bytes, %v", len(unit), err)
	}
}

// What cannot be written changes nothing.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	s := reopen(t, dir)
	run(t, s, content(1))
	full := errors.New("no space left on device")
	s.point = func(string) error { return full }
	if _, err := s.Add(content(2)); !errors.Is(err, full) {
		t.Error(err)
	}
	if err := s.Begin(1); !errors.Is(err, full) {
		t.Error(err)
	}
	want(t, s, "1 healthy; current 1 previous 0 order 0")
	s.point = nil
	if n := run(t, s, content(2)); n != 2 {
		t.Errorf("the next is %d", n)
	}
	for _, c := range []Content{{Proof: make([]byte, maxProof+1)}, {Proof: []byte("x"), Unit: make([]byte, maxUnit+1)}} {
		if _, err := s.Add(c); err == nil || !strings.Contains(err.Error(), "too much") {
			t.Errorf("a proof of %d bytes, a unit of %d: %v", len(c.Proof), len(c.Unit), err)
		}
	}
	for _, name := range []string{"0", "-1", "01", "+1", "1x", "99999999999999999999", strconv.Itoa(maxNumber + 1)} {
		if n, ok := number(name); ok {
			t.Errorf("%q is generation %d", name, n)
		}
	}
}

// A machine is in several networks: what one has staged outlives what another has
// staged after it, and each generation says whose it is.
func TestPruneKeepsTheNewestOfEachNetwork(t *testing.T) {
	dir := t.TempDir()
	s := reopen(t, dir)
	run(t, s, content(1))
	for i, network := range []string{"a", "b", "b"} {
		c := content(i + 2)
		c.Network = network
		_, err := s.Add(c)
		ok(t, err)
	}
	ok(t, s.Prune())
	v := reopen(t, dir)
	view := v.View()
	if got, want := v.states(), "1 healthy; 2 staged; 4 staged; current 1 previous 0 order 0"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if g := view.Get(2); g == nil || g.Network != "a" {
		t.Errorf("%+v", g)
	}
}

// Whatever the state file says, in its right form or not: what is whole is there,
// current and previous are among it, and the next generation comes up.
func FuzzOpen(f *testing.F) {
	f.Add(true, []byte(`{"next":3,"current":2,"previous":1,"order":0,"aside":null,"records":[{"number":1,"state":"healthy"},{"number":2,"state":"trial"}]}`))
	f.Add(true, []byte(`{"next":1,"current":9,"records":[{"number":-1}]}`))
	f.Add(false, []byte("sha256:"))
	f.Fuzz(func(t *testing.T, sealed bool, state []byte) {
		dir := t.TempDir()
		s := reopen(t, dir)
		run(t, s, content(1))
		run(t, s, content(2))
		if sealed {
			state = append([]byte(digest.Of(state).String()+"\n"), state...)
		}
		ok(t, os.WriteFile(filepath.Join(dir, stateFile), state, 0o600))
		s = reopen(t, dir)
		v, there := s.View(), map[int]bool{0: true}
		for _, g := range v.Generations {
			there[g.Number] = true
		}
		if !there[v.Current] || !there[v.Previous] || !there[v.Order] {
			t.Fatalf("%s", s.states())
		}
		n := run(t, s, content(3))
		s = reopen(t, dir)
		if v := s.View(); v.Current != n {
			t.Fatalf("%d is the newest, and %s", n, s.states())
		}
	})
}
