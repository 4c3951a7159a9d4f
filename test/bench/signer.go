package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/signer"
)

// startSigner runs resultity-signer with a key, as systemd would, and returns a
// client of it.
func startSigner(key *evm.Key) (c *signer.Client, stop func() error, err error) {
	dir, err := os.MkdirTemp("", "signer")
	if err != nil {
		return nil, nil, err
	}
	undo := []func() error{func() error { return os.RemoveAll(dir) }}
	stop = func() error {
		var errs []error
		for i := range undo {
			errs = append(errs, undo[len(undo)-1-i]())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, stop())
		}
	}()
	for name, text := range map[string]string{
		"resultity-key": key.Hex() + "\n", "resultity-accounts": fmt.Sprintf("resultity:x:%d:0::/:\n", os.Getuid()),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return nil, nil, err
		}
	}
	path := filepath.Join(dir, "socket")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, nil, err
	}
	undo = append(undo, ln.Close)
	f, err := ln.File()
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command("/bin/sh", "-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec build/bin/resultity-signer serve")
	cmd.Env = append(os.Environ(), "CREDENTIALS_DIRECTORY="+dir, "STATE_DIRECTORY="+dir)
	cmd.ExtraFiles, cmd.Stderr = []*os.File{f}, os.Stderr
	err = errors.Join(cmd.Start(), f.Close())
	if err != nil {
		return nil, nil, err
	}
	undo = append(undo, func() error {
		err := cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		return err
	})
	if c, err = signer.Dial(path); err != nil {
		return nil, nil, err
	}
	undo = append(undo, c.Close)
	return c, stop, nil
}
