package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/signer"
)

// Names of what systemd hands to the service.
const (
	keyCredential      = "resultity-key"      // 64 hexadecimal digits
	accountsCredential = "resultity-accounts" // /etc/passwd: there is no other file system
	account            = "resultity"          // whose processes may ask
	countersFile       = "counters"
)

// maxCredential bounds a credential, in bytes, as systemd does.
const maxCredential = 1 << 20

// serve signs on the socket that systemd has made.
func (c *command) serve(ctx context.Context) error {
	dir, state := c.env("CREDENTIALS_DIRECTORY"), c.env("STATE_DIRECTORY")
	if dir == "" || state == "" {
		return errors.New("serve is for systemd: systemctl start resultity-signer.socket")
	}
	ln, err := c.inherited()
	if err != nil {
		return err
	}
	raw, err := durable.ReadFile(filepath.Join(dir, keyCredential), maxCredential)
	if err != nil {
		return fmt.Errorf("the key: %w; make one with resultity-signer init, migrate or import", err)
	}
	key, err := evm.ParseKey(strings.TrimSpace(string(raw)))
	clear(raw)
	if err != nil {
		return err
	}
	uid, err := uidOf(filepath.Join(dir, accountsCredential), account)
	if err != nil {
		return err
	}
	counters, err := signer.OpenCounters(filepath.Join(state, countersFile), key.Address())
	if err != nil {
		return err
	}
	defer counters.Close() // everything in it is on disk
	if c.allow != "" {
		allowed, err := parseAllow(c.allow)
		if err != nil {
			return err
		}
		counters.Allow(allowed)
	}
	c.log.Info("ready to sign", journal.SignerReady.Attr(), "node", key.Address(), "starts", counters.Starts())
	s := &signer.Server{Local: signer.NewLocal(key, counters), Log: c.log, Serves: func(u uint32) bool { return u == uid || u == 0 }}
	return s.Serve(ctx, ln)
}

// inherited is the socket of resultity-signer.socket.
func (c *command) inherited() (*net.UnixListener, error) {
	if c.env("LISTEN_PID") != strconv.Itoa(os.Getpid()) || c.env("LISTEN_FDS") != "1" {
		return nil, errors.New("no socket from systemd: start resultity-signer.socket")
	}
	f := os.NewFile(3, "socket")
	defer f.Close()
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	unix, ok := ln.(*net.UnixListener)
	if !ok || unix.Addr().Network() != "unixpacket" {
		return nil, fmt.Errorf("the socket is of type %s, want ListenSequentialPacket=", ln.Addr().Network())
	}
	unix.SetUnlinkOnClose(false) // it is systemd's
	return unix, nil
}

// uidOf looks an account up in a file like /etc/passwd.
func uidOf(file, name string) (uint32, error) {
	raw, err := durable.ReadFile(file, maxCredential)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		f := strings.Split(line, ":")
		if len(f) < 3 || f[0] != name {
			continue
		}
		uid, err := strconv.ParseUint(f[2], 10, 32)
		return uint32(uid), err
	}
	return 0, fmt.Errorf("there is no account %s, whose agent could ask; systemd-sysusers makes it", name)
}

func parseAllow(s string) (map[string]uint64, error) {
	allowed := map[string]uint64{}
	for part := range strings.SplitSeq(s, ",") {
		name, chain, ok := strings.Cut(part, ":")
		id, err := strconv.ParseUint(chain, 10, 64)
		if !ok || err != nil || name == "" {
			return nil, fmt.Errorf("%w: --allow %.80q: want NAME:CHAIN", errUsage, part)
		}
		allowed[name] = id
	}
	return allowed, nil
}
