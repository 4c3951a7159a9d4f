package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// EnvDir names the environment variable that says where root file
	// systems and running hosts are kept. Unset, it is resultity/host in
	// $XDG_CACHE_HOME, or else /var/cache/resultity-node. Programs with
	// different directories do not see each other's hosts.
	EnvDir = "RESULTITY_HOST_DIR"

	// EnvMirror names the environment variable with the Debian mirror for
	// root file systems. Unset, mmdebstrap chooses.
	EnvMirror = "RESULTITY_HOST_MIRROR"
)

// baseDir is the directory that all state is in:
//
//	roots/KEY            an image, whole
//	roots/KEY.part       an image that somebody builds, who holds KEY.lock
//	labs.lock            held while a lab appears, goes, or gives out an address
//	labs/LAB/lab.json    a labRecord
//	labs/LAB/owner       locked by the process that owns the lab, as long as it lives
//	labs/LAB/net         the network namespace with the bridge
//	labs/LAB/hosts/HOST  a host, see hostDir
func baseDir() (string, error) {
	dir := os.Getenv(EnvDir)
	if dir == "" {
		dir = "/var/cache/resultity-node"
		if xdg := os.Getenv("XDG_CACHE_HOME"); filepath.IsAbs(xdg) {
			dir = filepath.Join(xdg, "resultity", "host")
		}
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if strings.ContainsAny(dir, `,:\"`) {
		return "", fmt.Errorf("%s: overlayfs cannot take this name of a directory; set %s to another", dir, EnvDir)
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// lockBase keeps out everybody else who adds or removes labs and hosts.
func lockBase(ctx context.Context) (*os.File, error) {
	base, err := baseDir()
	if err != nil {
		return nil, err
	}
	return lockFile(ctx, filepath.Join(base, "labs.lock"), nil)
}

// lockFile waits for an exclusive lock on the file, which it may create. It
// calls waiting, if not nil, before it waits. The lock ends with the last open
// copy of what it returns.
func lockFile(ctx context.Context, name string, waiting func()) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	// flock cannot wait for a context, and a thread in flock not be woken.
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		if waiting != nil {
			waiting()
			waiting = nil
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, ctx.Err())
		case <-tick.C:
		}
	}
}

// readRecord and writeRecord keep a value in a file that is never half written.
// Neither survives a power cut of the machine, nor does what they describe.
func readRecord(name string, v any) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func writeRecord(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := os.WriteFile(name+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}
