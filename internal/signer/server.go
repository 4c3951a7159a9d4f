package signer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/time/rate"

	"github.com/resultity/node/internal/journal"
)

// Bounds of what callers may take.
const (
	maxConns  = 16
	perSecond = 5000 // requests, of all callers; more wait
	burst     = 5000 // of them at once
)

// What a caller may take in time; tests are less patient.
var (
	writeTime = 5 * time.Second // for a caller to take its reply
	// idleTime is between a reply and the next request. It is shorter than a client's
	// patience: who comes while all places are held by silent ones still gets one. A
	// [Client] whose connection has ended makes another.
	idleTime = 10 * time.Second
)

// Server signs for callers on a socket.
type Server struct {
	Local *Local
	// Serves says whether a caller of the uid may ask. What it may ask does not
	// depend on who it is.
	Serves func(uid uint32) bool
	Log    *slog.Logger
}

// Serve answers until ctx ends, and leaves nothing running. The listener is of
// type unixpacket, and is closed.
func (s *Server) Serve(ctx context.Context, ln *net.UnixListener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	defer ln.Close()
	place := make(chan struct{}, maxConns)
	limit := rate.NewLimiter(perSecond, burst)
	complaints := rate.NewLimiter(1, 20) // a caller that is wrong a thousand times a second is one fact
	for {
		c, err := ln.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				_ = c.Close() // taken in the moment of the end: who is on it is not to wait for an answer
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		uid, err := caller(c)
		if err == nil && !s.Serves(uid) {
			err = fmt.Errorf("%w: uid %d", ErrCaller, uid)
		}
		if err == nil {
			select {
			case place <- struct{}{}:
			default:
				err = fmt.Errorf("%w: %d", ErrCrowded, maxConns)
			}
		}
		if err != nil {
			s.refused(complaints, uid, "connection", err)
			s.reply(c, nil, err)
			_ = c.Close() // it has been told
			continue
		}
		wg.Go(func() {
			defer func() { <-place }()
			defer c.Close()
			defer context.AfterFunc(ctx, func() { _ = c.Close() })()
			if addr := s.Local.Address(); !s.reply(c, addr[:], nil) {
				return
			}
			buf := make([]byte, maxRequest+1) // one more byte shows that there were more
			for {
				_ = c.SetReadDeadline(time.Now().Add(idleTime)) // only fails on a closed connection, which the read tells
				n, err := c.Read(buf)
				if err != nil {
					if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrDeadlineExceeded) {
						s.Log.Debug("connection of the agent ended", "error", err)
					}
					return
				}
				if limit.Wait(ctx) != nil {
					return
				}
				out, err := s.Local.answer(buf[:n])
				if err != nil {
					s.refused(complaints, uid, kind(buf[0]).String(), err)
				}
				if !s.reply(c, out, err) {
					return
				}
			}
		})
	}
}

// refused notes what was not signed. A head that goes back is no sign of a caller
// that is wrong: an agent whose disk was replaced asks for it, and says so itself.
func (s *Server) refused(l *rate.Limiter, uid uint32, what string, err error) {
	switch {
	case !l.Allow():
	case errors.Is(err, ErrBehind):
		s.Log.Info("head of a smaller receipt log is not signed", "uid", uid, "error", err)
	default:
		s.Log.Warn("signature refused", journal.SignatureRefused.Attr(), "uid", uid, "kind", what, "error", err)
	}
}

func (s *Server) reply(c *net.UnixConn, out []byte, err error) bool {
	b := append([]byte{0}, out...)
	if err != nil {
		b = encodeError(err)
		b = b[:min(len(b), 500)]
	}
	_ = c.SetWriteDeadline(time.Now().Add(writeTime)) // only fails on a closed connection, which the write tells
	_, err = c.Write(b)
	return err == nil
}

// caller returns the uid of who has connected, which nobody can make up.
func caller(c *net.UnixConn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *syscall.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		cred, failed = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil || failed != nil {
		return 0, errors.Join(err, failed)
	}
	return cred.Uid, nil
}
