package state

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// The tests of this file need a process of their own: to be killed, or to have
// a disk of its own. It is this test binary, told what to do by its argument.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 {
		switch os.Args[1] {
		case "crash":
			crashChild(os.Args[2])
		case "full", "full-without-fallocate":
			reserve := fallocate
			if os.Args[1] != "full" {
				reserve = func(uintptr, int64) error { return syscall.EOPNOTSUPP }
			}
			if err := fullChild(os.Args[2], reserve); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

// crashChild works on a store until it is killed, and says on its standard output
// what it is about to do and what has been done. Nothing is buffered here.
func crashChild(path string) {
	s, err := Open(path, Bounds{}, time.Now)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	say := func(what string, id receipt.JobID) { _, _ = os.Stdout.WriteString(what + " " + id.String() + "\n") }
	check := func(err error) {
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	fmt.Println("open")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				j := newJob(rand.IntN(20_000))
				say("accepting", j.ID)
				_, err := s.Accept(j)
				check(err)
				say("accepted", j.ID)
				if rand.IntN(4) == 0 {
					continue
				}
				check(s.Finish(crashResult(j.ID)))
				say("finished", j.ID)
				if rand.IntN(2) == 0 {
					say("acking", j.ID)
					check(s.Ack([]receipt.JobID{j.ID}))
					say("acked", j.ID)
				}
			}
		})
	}
	wg.Wait()
}

// crashResult is known from the job's id alone. It is a failure: those leave
// nothing behind once they are acknowledged, which is the harder case.
func crashResult(id receipt.JobID) *wire.Result {
	return &wire.Result{Job: id, Code: wire.CodeEngine, Message: "m", Response: bytes.Repeat(id[:], int(id[0])*10)}
}

func TestKill(t *testing.T) {
	path := newPath(t)
	last := map[receipt.JobID]string{}
	for round := range 25 {
		killedChild(t, path, time.Duration(rand.IntN(60))*time.Millisecond, last)
		s := open(t, path) // checks the whole file
		unfinished := map[receipt.JobID]bool{}
		jobs, err := s.Unfinished()
		if err != nil {
			t.Fatal(err)
		}
		for _, j := range jobs {
			unfinished[j.ID] = true
		}
		for id, what := range last {
			r, finished, err := s.Result(id)
			if err != nil {
				t.Fatal(err)
			}
			if finished && !bytes.Equal(r.Response, crashResult(id).Response) {
				t.Errorf("round %d: job %s has a wrong result", round, id)
			}
			ok := false
			switch what {
			case "accepting": // whatever happened, it is one of three
				ok = !finished
			case "accepted": // perhaps finished, but not yet said
				ok = finished != unfinished[id]
			case "finished":
				ok = finished && !unfinished[id]
			case "acking":
				ok = !unfinished[id]
			case "acked":
				ok = !finished && !unfinished[id]
			}
			if !ok {
				t.Errorf("round %d: job %s was last %q; unfinished %v, finished %v", round, id, what, unfinished[id], finished)
			}
			// What is settled now is so for the next rounds.
			switch {
			case unfinished[id]:
				last[id] = "accepted"
			case finished:
				last[id] = "finished"
			default:
				last[id] = "acked"
			}
		}
		if got, want := s.Counts().Accepted, len(jobs); got != want {
			t.Errorf("round %d: Counts says %d accepted, there are %d", round, got, want)
		}
		s.Close()
	}
	if len(last) < 100 {
		t.Errorf("only %d jobs in all rounds: the child is killed before it works", len(last))
	}
}

// killedChild runs a child on path, kills it that long after it has opened the
// store, and notes the last word on each job.
func killedChild(t *testing.T, path string, after time.Duration, last map[receipt.JobID]string) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "crash", path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		what, id, _ := strings.Cut(lines.Text(), " ")
		switch what {
		case "open":
			time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
			continue
		case "error":
			t.Fatal(lines.Text())
		}
		job, err := receipt.ParseJobID(id)
		if err != nil {
			break // the line that the kill cut short
		}
		last[job] = what
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("the child ended by itself")
	}
}

// TestFullDisk runs fullChild in its own user and mount namespace, so that it
// may mount a small disk, and nothing of it stays whatever happens.
func TestFullDisk(t *testing.T) {
	for _, what := range []string{"full", "full-without-fallocate"} {
		cmd := exec.Command(os.Args[0], what, t.TempDir())
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
			Pdeathsig:   syscall.SIGKILL,
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", what, err, out)
		}
	}
}

func fullChild(dir string, reserve func(uintptr, int64) error) error {
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=7900k"); err != nil {
		return err
	}
	path := filepath.Join(dir, "jobs.db")
	s, err := Open(path, Bounds{}, time.Now)
	if err != nil {
		return err
	}
	s.reserve = reserve
	// Jobs until the disk is full.
	var jobs []*wire.Job
	for {
		j := newJob(300 << 10)
		if _, err = s.Accept(j); err != nil {
			break
		}
		jobs = append(jobs, j)
	}
	if !errors.Is(err, ErrFull) || !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("Accept on a full disk = %v, want ErrFull and ENOSPC", err)
	}
	if len(jobs) < 10 {
		return fmt.Errorf("only %d jobs fit", len(jobs))
	}
	// What was asked for and not got has been given back.
	if _, err := s.Accept(newJob(5 << 20)); !errors.Is(err, ErrFull) {
		return fmt.Errorf("a job larger than the disk: %v, want ErrFull", err)
	}
	if info, err := s.file.Stat(); err != nil || info.Size() != s.allocated {
		return fmt.Errorf("the file has %d bytes, of which %d are known to be backed (%v)", info.Size(), s.allocated, err)
	}
	// Somebody else takes what is left.
	ballast, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		return err
	}
	for err == nil {
		_, err = ballast.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		return err
	}
	for i := range 5 {
		if _, err := s.Accept(newJob(1 << 20)); !errors.Is(err, ErrFull) {
			return fmt.Errorf("try %d: Accept = %v, want ErrFull", i, err)
		}
	}
	// A large result does not fit, a failure always does; and so after a restart.
	for i, j := range jobs {
		big := &wire.Result{Job: j.ID, Response: make([]byte, 4<<20)}
		if err := s.Finish(big); i < 3 && !errors.Is(err, ErrFull) {
			return fmt.Errorf("job %d: Finish with a large result = %v, want ErrFull", i, err)
		}
		if i == len(jobs)/2 {
			if err := s.Close(); err != nil {
				return err
			}
			if s, err = Open(path, Bounds{}, time.Now); err != nil {
				return fmt.Errorf("Open on a full disk: %w", err)
			}
			s.reserve = reserve
		}
		r := failure(j)
		r.Message = strings.Repeat("\x01", MaxMessage)
		if err := s.Finish(r); err != nil && !errors.Is(err, ErrConflict) {
			return fmt.Errorf("job %d: a failure does not fit: %w", i, err)
		}
	}
	if n := s.Counts(); n.Accepted != 0 || n.Results != len(jobs) {
		return fmt.Errorf("Counts = %+v, want %d results", n, len(jobs))
	}
	// Acknowledgements make room, without any from outside.
	var ids []receipt.JobID
	for _, j := range jobs {
		ids = append(ids, j.ID)
	}
	if err := s.Ack(ids); err != nil {
		return fmt.Errorf("Ack on a full disk: %w", err)
	}
	// And when the disk has room again, work goes on.
	if err := errors.Join(ballast.Close(), os.Remove(ballast.Name())); err != nil {
		return err
	}
	j := newJob(100 << 10)
	if known, err := s.Accept(j); known != New || err != nil {
		return fmt.Errorf("Accept = %v, %v; want New", known, err)
	}
	if err := s.Close(); err != nil {
		return err
	}
	if s, err = Open(path, Bounds{}, time.Now); err != nil {
		return err
	}
	return s.Close()
}

// Whatever byte of the file is wrong, Open says so or the byte does not matter:
// no panic, no hang, and never a record that is not the one written.
func TestDamage(t *testing.T) {
	path := newPath(t)
	s := open(t, path)
	want := map[receipt.JobID][]byte{}
	for i := range 200 { // enough for branch pages
		j := newJob(i * 3)
		accept(t, s, j, New)
		want[j.ID] = j.Request
		if i%3 == 0 {
			finish(t, s, failure(j))
			delete(want, j.ID)
		}
		if i%6 == 0 {
			ack(t, s, j.ID)
		}
	}
	large := newJob(50_000)
	accept(t, s, large, New)
	want[large.ID] = large.Request
	var used int64
	if err := s.db.View(func(tx *bolt.Tx) error { used = tx.Size(); return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	good = good[:used]
	path = newPath(t)
	try := func(name string, b []byte) (opened bool) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(path, Bounds{}, now)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !strings.Contains(err.Error(), "its format is") {
				t.Errorf("%s: Open = %v, want ErrCorrupt", name, err)
			}
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, b) {
				t.Errorf("%s: Open has changed the file (%v)", name, err)
			}
			return false
		}
		defer s.Close()
		jobs, err := s.Unfinished()
		if err != nil {
			t.Errorf("%s: opened, but Unfinished = %v", name, err)
		}
		for _, j := range jobs {
			if !bytes.Equal(j.Request, want[j.ID]) {
				t.Errorf("%s: opened, but job %s is not the one written", name, j.ID)
			}
		}
		return true
	}
	if !try("as it was", good) {
		t.Fatal("the undamaged copy does not open")
	}
	for _, n := range []int64{1, 4096, 8192, 16384, used / 2, used - 4096} {
		if try(fmt.Sprintf("cut to %d", n), good[:n]) {
			t.Errorf("opened when cut to %d bytes of %d", n, used)
		}
	}
	for name, b := range map[string][]byte{
		"zeros": make([]byte, 1<<16),
		"text":  bytes.Repeat([]byte("this is no database\n"), 5000),
		"half":  append(bytes.Clone(good[:used/2]), make([]byte, used/2)...),
	} {
		if try(name, b) {
			t.Errorf("%s: opened", name)
		}
	}
	flipped := func(at int64) []byte {
		b := bytes.Clone(good)
		b[at] ^= 1 << rand.IntN(8)
		return b
	}
	for page := int64(0); page < used; page += pageSize {
		for range 30 { // where the structure is
			at := page + rand.Int64N(300)
			if b := flipped(at); verifyPages(bytes.NewReader(b), used) == nil && rand.IntN(10) == 0 {
				try(fmt.Sprintf("byte %d", at), b)
			}
		}
	}
	opened := 0
	for range 200 {
		at := rand.Int64N(used)
		if try(fmt.Sprintf("byte %d", at), flipped(at)) {
			opened++
		}
	}
	t.Logf("%d bytes; of 200 random flips %d fell where nothing is", used, opened)
}

// Damage that bbolt would follow for ever, or notice only after it has written.
func TestVerifyPages(t *testing.T) {
	path := newPath(t)
	s := open(t, path)
	for range 3 {
		accept(t, s, newJob(8000), New) // too large to be inline: each has a page of its own
	}
	s.Close()
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	u16, u32, u64 := binary.NativeEndian.Uint16, binary.NativeEndian.Uint32, binary.NativeEndian.Uint64
	put := binary.NativeEndian.PutUint64
	pages := max(u64(good[pageHeader+40:]), u64(good[pageSize+pageHeader+40:]))
	// The leaf of the bucket jobs, the last one if there are older ones.
	var leaf uint64
	var keys, roots []uint64 // offsets
	// The free list that the newer root names.
	var freelist uint64
	if m0, m1 := good[pageHeader:], good[pageSize+pageHeader:]; u64(m0[48:]) > u64(m1[48:]) {
		freelist = u64(m0[32:])
	} else {
		freelist = u64(m1[32:])
	}
	free := map[uint64]bool{}
	for i := range uint64(u16(good[freelist*pageSize+10:])) {
		free[u64(good[freelist*pageSize+pageHeader+8*i:])] = true
	}
	for id := uint64(2); id < pages; id++ {
		page := good[id*pageSize:]
		if free[id] || u64(page) != id || u16(page[8:]) != flagLeaf || u16(page[10:]) != 3 || u32(page[pageHeader:]) != flagBucket {
			continue
		}
		leaf, keys, roots = id, nil, nil
		for i := range uint64(3) {
			at := id*pageSize + pageHeader + i*element
			keys = append(keys, at+uint64(u32(good[at+4:])))
			roots = append(roots, keys[i]+uint64(u32(good[at+8:])))
		}
	}
	if leaf == 0 || len(free) == 0 {
		t.Fatal("the pages to damage were not found")
	}
	for name, damage := range map[string]func(b []byte){
		"":                           func([]byte) {},
		"a bucket is its own parent": func(b []byte) { put(b[roots[1]:], leaf) },
		"two buckets are one":        func(b []byte) { put(b[roots[1]:], u64(b[roots[0]:])) },
		"a bucket far away":          func(b []byte) { put(b[roots[1]:], 1<<60) },
		"a bucket beyond the last": func(b []byte) {
			at := pages + 1
			put(b[roots[1]:], at)
			put(b[at*pageSize:], at)
			b[at*pageSize+8] = flagLeaf
		},
		"keys out of order": func(b []byte) { b[keys[0]], b[keys[1]] = 0xFF, 0 },
		"a page that is free and used": func(b []byte) {
			b[freelist*pageSize+10]++
			put(b[freelist*pageSize+pageHeader+8*uint64(len(free)):], leaf)
		},
		"a free page beyond the last": func(b []byte) { put(b[freelist*pageSize+pageHeader:], pages) },
		"a free page is missing": func(b []byte) {
			b[freelist*pageSize+10]--
		},
		"more pages than the file has": func(b []byte) {
			for _, at := range []int{pageHeader, pageSize + pageHeader} {
				put(b[at+40:], 1<<40)
				sum := fnv.New64a()
				sum.Write(b[at : at+56])
				put(b[at+56:], sum.Sum64())
			}
		},
	} {
		b := bytes.Clone(good)
		damage(b)
		if err := verifyPages(bytes.NewReader(b), int64(len(b))); (err == nil) != (name == "") {
			t.Errorf("%s: verifyPages = %v", name, err)
		}
	}
}

func FuzzVerifyPages(f *testing.F) {
	path := newPath(f)
	s := open(f, path)
	j := newJob(10)
	accept(f, s, j, New)
	accept(f, s, newJob(5000), New)
	finish(f, s, failure(j))
	s.Close()
	good, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good[:20*pageSize], 5000)
	f.Fuzz(func(_ *testing.T, b []byte, size int) {
		_ = verifyPages(bytes.NewReader(b), int64(min(uint(size), 1<<30))) // ends, without a panic
	})
}
