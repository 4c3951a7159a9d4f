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
	s, err = Open(os.Args[1], &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}, slog.New(slog.DiscardHandler))
	check(err)
	s.pace.delays = []time.Duration{time.Millisecond}
	s.margin = 1 << 20
	return s, m
}

func fetchChild() {
	s, m := inChild()
	_, err := s.Ensure(context.Background(), m, func(done, _ int64) { fmt.Println(done) })
	fmt.Println("ended", err)
}

// TestKilledInMidDownload kills a process with SIGKILL while it downloads; the
// next one fetches only the rest.
func TestKilledInMidDownload(t *testing.T) {
	b := content(9 << 20)
	const at = 4 << 20
	g := &good{b: b, etag: `"v1"`}
	var later atomic.Bool
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if later.Swap(true) {
			g.ServeHTTP(w, r)
			return
		}
		w.Header().Set("ETag", g.etag)
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		_, _ = w.Write(b[:at])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
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
		if lines.Text() == strconv.Itoa(at) {
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
	s := open(t, dir, clientFor(srv))
	if _, err := s.Ensure(t.Context(), m, nil); err != nil {
		t.Fatal(err)
	}
	if want := []string{fmt.Sprintf(`bytes=%d- "v1"`, at)}; !slices.Equal(g.asked(), want) {
		t.Errorf("asked for %q, want %q", g.asked(), want)
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
		case e.Need != need || e.Free >= e.Need || e.Dir != dir:
			fmt.Printf("%s: %+v, need should be %d\n", what, e, need)
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
	_, err = s.Ensure(ctx, m, func(done, _ int64) {
		if done == 2<<20 {
			fill(1 << 20)
		}
	})
	expect("middle", err, m.Size()-3<<20)
	if err := os.Remove(ballast); err != nil {
		fmt.Println(err)
	}
	// The same with a margin, which the download must not touch.
	s.window = 1 << 20
	_, err = s.Ensure(ctx, m, func(done, _ int64) {
		if done == 4<<20 {
			fill(3 << 20)
			s.margin = 2 << 20
		}
	})
	expect("margin", err, m.Size()-5<<20)
	s.margin = 0
	if free, err := s.free(); err != nil || free < 1<<20 {
		fmt.Printf("margin: %d bytes are left, %v\n", free, err)
	}
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
	g := &good{b: b, etag: `"v1"`}
	srv := serve(t, g.ServeHTTP)
	cmd := child(t, "full", t.TempDir(), writeCA(t, srv), modelOf(fileOf("f", b, srv.URL)))
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWNS | syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.Output()
	if err != nil || string(out) != "done\n" {
		t.Fatalf("%v:\n%s", err, out)
	}
	// Cut short, gone on with twice, and fetched anew after the damage.
	if want := []string{" ", fmt.Sprintf(`bytes=%d- "v1"`, 3<<20), fmt.Sprintf(`bytes=%d- "v1"`, 5<<20), " "}; !slices.Equal(g.asked(), want) {
		t.Errorf("asked for %q, want %q", g.asked(), want)
	}
}
