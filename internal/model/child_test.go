package model

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/model/fetch"
	"github.com/resultity/node/internal/model/modeltest"
	"github.com/resultity/node/internal/snapshot"
)

// children are what this test binary does instead of testing when it is started
// as a process of its own, by name.
var children = map[string]func(){"fetch": fetchChild, "full": fullChild}

// child starts one. The model and the server's certificate are passed in files.
func child(t *testing.T, name, dir, ca string, m *snapshot.Model) *exec.Cmd {
	t.Helper()
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	spec := filepath.Join(t.TempDir(), "model.json")
	if err := os.WriteFile(spec, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], dir, ca, spec)
	cmd.Env = append(os.Environ(), "MODEL_TEST_CHILD="+name)
	cmd.Stderr = os.Stderr
	return cmd
}

// inChild reads what child passed.
func inChild() (s *Store, m *snapshot.Model) {
	check := func(err error) {
		if err != nil {
			fmt.Println("child:", err)
			os.Exit(2)
		}
	}
	ca, err := os.ReadFile(os.Args[2])
	check(err)
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		check(errors.New("no certificate"))
	}
	raw, err := os.ReadFile(os.Args[3])
	check(err)
	check(json.Unmarshal(raw, &m))
	x := fetch.New(&http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}, nil, slog.New(slog.DiscardHandler))
	x.Pace.Delays = []time.Duration{time.Millisecond}
	s, err = Open(os.Args[1], x, slog.New(slog.DiscardHandler))
	check(err)
	s.margin = 1 << 20
	return s, m
}

func fetchChild() {
	s, m := inChild()
	_, err := s.Ensure(context.Background(), m, func(done, _ int64) { fmt.Println(done) })
	fmt.Println("ended", err)
}

// TestKilledInMidDownload kills a process with SIGKILL while it downloads; the
// next one fetches only the chunks that were not there.
func TestKilledInMidDownload(t *testing.T) {
	const size = 4*chunk.Size + 3
	b := content(size)
	g := &modeltest.Good{B: b}
	var later atomic.Bool
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if got := r.Header.Get("Range"); !later.Load() && got != rangeOf(0, size) && got != rangeOf(2, size) {
			<-r.Context().Done()
			return
		}
		g.ServeHTTP(w, r)
	})
	m := modelOf(fileOf("f", b, srv.URL))
	dir := t.TempDir()
	cmd := child(t, "fetch", dir, writeCA(t, srv), m)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "ended") {
			t.Error(lines.Text())
		}
		if n, _ := strconv.Atoi(lines.Text()); n == 2*chunk.Size {
			break
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("the child ended by itself")
	}
	if got := finals(t, dir); len(got) != 0 {
		t.Errorf("under a final name: %v", got)
	}
	later.Store(true)
	before := len(g.Asked())
	s := open(t, dir, srv)
	if _, err := s.Ensure(t.Context(), m, nil); err != nil {
		t.Fatal(err)
	}
	got := g.Asked()[before:]
	slices.Sort(got)
	want := []string{rangeOf(1, size), rangeOf(3, size), rangeOf(4, size)}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("asked for %q, want %q", got, want)
	}
	if err := s.Verify(t.Context(), m); err != nil {
		t.Error(err)
	}
}

// fullChild plays a full disk. It has a mount namespace of its own, so the
// small file system that it mounts is nobody else's and goes with it.
func fullChild() {
	dir := os.Args[1]
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=16m"); err != nil {
		fmt.Println("mount:", err)
		os.Exit(2)
	}
	s, m := inChild()
	ballast := filepath.Join(dir, "ballast")
	expect := func(what string, err error, need int64) {
		e, ok := errors.AsType[*NoSpaceError](err)
		switch {
		case !ok || !errors.Is(err, syscall.ENOSPC):
			fmt.Printf("%s: error %v\n", what, err)
		case e.Need > need || e.Need == 0 || e.Free >= e.Need || e.Dir != dir:
			fmt.Printf("%s: %+v, need should be at most %d\n", what, e, need)
		case s.Have(m):
			fmt.Printf("%s: has it\n", what)
		}
	}
	fill := func(leave int64) {
		s.margin = 0
		free, err := s.free()
		if err == nil {
			err = os.WriteFile(ballast, make([]byte, free-leave), 0o600)
		}
		if err != nil {
			fmt.Println("fill:", err)
		}
	}
	ctx := context.Background()

	// Too little from the start: not one byte is asked for.
	fill(4 << 20)
	_, err := s.Ensure(ctx, m, func(done, _ int64) {
		if done != 0 {
			fmt.Println("preflight: wrote", done)
		}
	})
	expect("preflight", err, m.Size())

	// Somebody else takes the space in the middle. What has arrived stays, and
	// is not fetched again once there is room.
	if err := os.Remove(ballast); err != nil {
		fmt.Println(err)
	}
	filled := false
	_, err = s.Ensure(ctx, m, func(done, _ int64) {
		if done >= chunk.Size && done < m.Size() && !filled {
			filled = true
			fill(1 << 20)
			fmt.Println("filled")
		}
	})
	expect("middle", err, chunk.Size*2)
	if err := os.Remove(ballast); err != nil {
		fmt.Println(err)
	}
	if _, err = s.Ensure(ctx, m, nil); err != nil || !s.Have(m) {
		fmt.Println("with room:", err)
	}
	// A damaged file makes room for the good one.
	blob := filepath.Join(dir, blobs, m.Files[0].SHA256.Hex())
	if err := errors.Join(os.Chmod(blob, 0o600), os.WriteFile(blob, make([]byte, m.Size()), 0o600)); err != nil {
		fmt.Println(err)
	}
	if err := s.Verify(ctx, m); err == nil {
		fmt.Println("verify: took zeros")
	}
	if _, err = s.Ensure(ctx, m, nil); err != nil {
		fmt.Println("after quarantine:", err)
	}
	fmt.Println("done")
}

func TestFullDisk(t *testing.T) {
	b := content(9 << 20)
	g := &modeltest.Good{B: b}
	full := make(chan struct{})
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") != rangeOf(0, len(b)) {
			<-full // so that the first chunk is there before
		}
		g.ServeHTTP(w, r)
	})
	cmd := child(t, "full", t.TempDir(), writeCA(t, srv), modelOf(fileOf("f", b, srv.URL)))
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWNS | syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said []string
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if said = append(said, lines.Text()); lines.Text() == "filled" {
			close(full)
		}
	}
	if err := cmd.Wait(); err != nil || !slices.Equal(said, []string{"filled", "done"}) {
		t.Fatalf("%v: %q", err, said)
	}
	// The first chunk was fetched once, and once more after all was damaged.
	if n := len(slices.DeleteFunc(g.Asked(), func(r string) bool { return r != rangeOf(0, len(b)) })); n != 2 {
		t.Errorf("the first chunk was fetched %d times: %q", n, g.Asked())
	}
}
