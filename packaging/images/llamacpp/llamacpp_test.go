package llamacpp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/packaging/images"
	"github.com/resultity/node/test/model"
)

// sealedArg0 makes this test program put itself into the image and become the
// image's program.
const sealedArg0 = "sealed"

func TestMain(m *testing.M) {
	if os.Args[0] == sealedArg0 {
		fmt.Fprintln(os.Stderr, sealed(os.Args[1], os.Args[2], os.Args[3], os.Args[4:]))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// sealed runs argv in the unpacked image as the runtime's unit would: root
// read-only, models read-only, one writable directory, no privileges. It only
// returns if it fails. The process must be in namespaces of its own and hold
// the ambient capabilities to mount and to change its root there.
func sealed(root, models, sockets string, argv []string) error {
	runtime.LockOSThread() // capabilities belong to the thread
	const quiet = unix.MS_NOSUID | unix.MS_NODEV
	for _, m := range []struct {
		src, dst string
		flags    uintptr
	}{
		{"", "/", unix.MS_REC | unix.MS_PRIVATE},
		{root, root, unix.MS_BIND},
		{models, root + images.ModelsDir, unix.MS_BIND},
		{"", root + images.ModelsDir, unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY | quiet},
		{sockets, root + images.SocketDir, unix.MS_BIND},
		{"", root, unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY | quiet},
	} {
		if err := unix.Mount(m.src, m.dst, "", m.flags, ""); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.src, m.dst, err)
		}
	}
	if err := unix.Chroot(root); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if err := os.WriteFile("/tmp/x", nil, 0o600); !errors.Is(err, unix.EROFS) {
		return fmt.Errorf("writing in the root gives %v, want a read-only file system", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	return fmt.Errorf("exec %s: %w", argv[0], unix.Exec(argv[0], argv, []string{}))
}

// engine returns a command that runs the image's entry point, sealed, with the
// given arguments; sockets is the host's side of the socket directory.
func engine(t *testing.T, img images.Image, sockets string, args ...string) *exec.Cmd {
	t.Helper()
	root, models := t.TempDir(), t.TempDir()
	if err := img.Unpack(root); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(models, model.FileName), model.GGUF(), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Args = slices.Concat([]string{sealedArg0, root, models, sockets}, Recipe().Entrypoint, args)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWIPC,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 1000, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 1000, HostID: os.Getgid(), Size: 1}},
		AmbientCaps: []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_SYS_CHROOT},
		Pdeathsig:   unix.SIGKILL,
	}
	return cmd
}

// build returns the image, from the machine's cache where it is.
func build(t *testing.T) images.Image {
	t.Helper()
	img, err := images.Build(t.Context(), Recipe(), images.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestReproducible builds the image twice more from the packages of the first
// build and expects its digest each time, whatever the order.
func TestReproducible(t *testing.T) {
	img := build(t)
	debs, err := images.Packages(t.Context(), Recipe(), images.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, order := range []func([]*images.Package){func([]*images.Package) {}, slices.Reverse[[]*images.Package]} {
		ps, err := images.Load(t.Context(), debs)
		if err != nil {
			t.Fatal(err)
		}
		order(ps)
		again, err := images.Assemble(Recipe(), ps)
		if err != nil {
			t.Fatal(err)
		}
		if err := images.Verify(Recipe(), again); err != nil {
			t.Errorf("verify: %v", err)
		}
		if got, err := again.Digest(); err != nil || got != img.Digest {
			t.Errorf("built again: digest %v, error %v, want %v", got, err, img.Digest)
		}
	}
}

// TestVersion runs the engine as it is in the image.
func TestVersion(t *testing.T) {
	out, err := engine(t, build(t), t.TempDir(), "--version").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "version:") {
		t.Fatalf("llama-server --version: %v\n%s", err, out)
	}
}

// TestAnswers runs the engine with the model and asks it all that we know the
// answer to. It also is what keeps the list of answers true.
func TestAnswers(t *testing.T) {
	sockets, err := os.MkdirTemp("", "engine") // short: the kernel allows a socket 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })
	cmd := engine(t, build(t), sockets,
		"-m", images.ModelsDir+"/"+model.FileName, "--alias", model.Name,
		"--host", images.SocketDir+"/engine.sock", "--offline", "--no-ui", "--no-slots",
		"-t", "1", "-np", "1", "-c", fmt.Sprint(model.ContextTokens), "--cache-ram", "0", "--threads-http", "2")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := false
	defer func() {
		if !exited {
			cmd.Process.Kill()
			cmd.Wait()
		}
	}()

	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(sockets, "engine.sock"))
		},
	}}
	defer client.CloseIdleConnections()
	waitHealthy(t, client, stderr)

	for _, p := range model.Prompts() {
		got, err := ask(t.Context(), client, p.User)
		if err != nil {
			t.Fatalf("%q: %v", p.User, err)
		}
		if got != p.Answer {
			t.Errorf("%q: answer %q, want %q", p.User, got, p.Answer)
		}
	}
	client.CloseIdleConnections()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	exited = true
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v, want a clean exit", err)
	}
}

// waitHealthy returns when the engine answers. It asks again whenever the
// engine has logged a line, since the last one is logged when it is ready, and
// keeps reading afterwards, since an engine whose pipe is full stands still.
func waitHealthy(t *testing.T, c *http.Client, log io.Reader) {
	t.Helper()
	lines := bufio.NewReader(log)
	var seen bytes.Buffer
	for {
		line, err := lines.ReadBytes('\n')
		seen.Write(line)
		if err != nil {
			t.Fatalf("engine ended before it was ready: %v\n%s", err, &seen)
		}
		resp, err := c.Get("http://engine/health")
		if err != nil {
			continue
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			go io.Copy(io.Discard, lines) // ends with the engine
			return
		}
	}
}

// ask returns the engine's answer to one message at temperature 0.
func ask(ctx context.Context, c *http.Client, user string) (string, error) {
	body, err := json.Marshal(map[string]any{
		"messages":    []map[string]string{{"role": "user", "content": user}},
		"temperature": 0,
		"max_tokens":  400,
	})
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://engine/v1/chat/completions", bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", resp.Status, b)
	}
	var a struct {
		Choices []struct {
			Message struct{ Content string }
			Reason  string `json:"finish_reason"`
		}
	}
	if err := json.Unmarshal(b, &a); err != nil {
		return "", err
	}
	if len(a.Choices) != 1 || a.Choices[0].Reason != "stop" {
		return "", fmt.Errorf("unexpected answer: %s", b)
	}
	return a.Choices[0].Message.Content, nil
}
