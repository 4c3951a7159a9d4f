package state

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/evm"
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
		case "full":
			if err := fullChild(os.Args[2]); err != nil {
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
	s.leafOf = modelLeaf
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

// crashResult is known from the job's id alone. Most are failures: those leave
// nothing behind once they are acknowledged, which is the harder case. The others
// have a leaf in the receipt log.
func crashResult(id receipt.JobID) *wire.Result {
	if id[1]%4 > 0 {
		return &wire.Result{Job: id, Code: wire.CodeEngine, Message: string(bytes.Repeat(id[:], int(id[0])/4))}
	}
	return &wire.Result{Job: id, Response: bytes.Repeat(id[:], int(id[0])*10)}
}

func TestKill(t *testing.T) {
	path := newPath(t)
	last := map[receipt.JobID]string{}
	var log ReceiptLog // of the round before
	for round := range 15 {
		killedChild(t, path, 5+rand.IntN(60), last)
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
			if want := crashResult(id); finished && (r.Message != want.Message || !bytes.Equal(r.Response, want.Response)) {
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
			case "acking", "acked": // the kill may have come before it was written
				ok = !unfinished[id]
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
			case what == "accepting":
				delete(last, id) // it never was
			default:
				last[id] = "acked"
			}
		}
		// The receipt log has each job that has ended with a receipt, once, and
		// all that it had before.
		is := s.ReceiptLog()
		if before := s.LogAt(log.Size); before == nil || log.Size > 0 && before.Root() != log.Root {
			t.Errorf("round %d: the receipt log of %d does not begin with that of %d before", round, is.Size, log.Size)
		}
		log = is
		entries := map[evm.Hash]int{}
		for _, leaf := range s.Leaves(0, int(is.Size)) {
			entries[leaf]++
		}
		for id, what := range last {
			leaf, ends := modelLeaf(crashResult(id))
			want := 0
			if ends && (what == "finished" || what == "acked") {
				want = 1
			}
			if entries[leaf] != want {
				t.Errorf("round %d: job %s, last %q, is in the receipt log %d times", round, id, what, entries[leaf])
			}
			delete(entries, leaf)
		}
		if len(entries) > 0 {
			t.Errorf("round %d: %d leaves of nothing", round, len(entries))
		}
		if got, want := s.Counts().Accepted, len(jobs); got != want {
			t.Errorf("round %d: Counts says %d accepted, there are %d", round, got, want)
		}
		s.Close()
	}
	if len(last) < 100 {
		t.Errorf("only %d jobs in all rounds", len(last))
	}
}

// killedChild runs a child on path, kills it at any moment behind so many accepted
// jobs, and notes the last word on each job.
func killedChild(t *testing.T, path string, accepted int, last map[receipt.JobID]string) {
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
			continue
		case "accepted":
			if accepted--; accepted == 0 {
				time.AfterFunc(rand.N(10*time.Millisecond), func() { _ = cmd.Process.Kill() })
			}
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
	cmd := exec.Command(os.Args[0], "full", t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func fullChild(dir string) error {
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=15900k"); err != nil {
		return err
	}
	path := filepath.Join(dir, "jobs")
	s, err := Open(path, Bounds{}, time.Now)
	if err != nil {
		return err
	}
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
	if _, err := s.Accept(newJob(10 << 20)); !errors.Is(err, ErrFull) {
		return fmt.Errorf("a job larger than the disk: %v, want ErrFull", err)
	}
	names, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	if want := 1 + len(s.segments) + len(s.spares); len(names) != want {
		return fmt.Errorf("%d files, want %d", len(names), want)
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
