// Package clients runs code that is not ours against what is ours: OpenAI's
// JavaScript client against the API, ethers against receipts, Solidity's compiler
// on the contract.
package clients

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// dir returns where the scripts are, with their packages installed. The lock
// file says exactly which. Test programs run side by side: one installs, and the
// others find it done.
var dir = sync.OnceValues(func() (_ string, err error) {
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", err
	}
	d := filepath.Join(filepath.Dir(strings.TrimSpace(string(mod))), "test/clients")
	lock, err := os.Open(d)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", d, err)
	}
	want, err := os.ReadFile(filepath.Join(d, "package-lock.json"))
	if err != nil {
		return "", err
	}
	stamp := filepath.Join(d, "node_modules", "installed.json") // what was installed: npm ci begins by removing it
	if has, err := os.ReadFile(stamp); err == nil && bytes.Equal(has, want) {
		return d, nil
	}
	if _, err := exec.LookPath("npm"); err != nil {
		if out, err := exec.Command("sh", "-c", "apt-get update -q && apt-get install -q -y --no-install-recommends nodejs npm").CombinedOutput(); err != nil {
			return "", fmt.Errorf("install nodejs and npm: %w\n%s", err, out)
		}
	}
	cmd := exec.Command("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts")
	cmd.Dir = d
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("npm ci: %w\n%s", err, out)
	}
	return d, os.WriteFile(stamp, want, 0o644)
})

// Run runs one of the scripts with input and further environment, and returns
// what it printed.
func Run(ctx context.Context, script string, input []byte, env ...string) (string, error) {
	d, err := dir()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "node", script)
	cmd.Dir = d
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdin = bytes.NewReader(input)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("node %s: %w\n%s", script, err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), nil
}
