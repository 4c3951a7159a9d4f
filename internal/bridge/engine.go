package bridge

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/bridge/sandbox"
)

// engine is the engine's process. The goroutine in reap owns its id: nobody
// else waits for it or signals it, so a signal can never reach a process that
// got the id after it.
type engine struct {
	pid     int
	signals chan syscall.Signal
	exited  chan syscall.WaitStatus // gets one value
}

// startEngine starts the engine in a process group of its own, confined by
// [sandbox.Confine], in a directory where nobody can put files,
// and without a way to speak to systemd by mistake.
func startEngine(argv []string, order sandbox.Order) (*engine, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	var pid int
	var forkErr error
	_, err = sandbox.Confine(order, func() {
		// Not os/exec: this process reaps all children itself.
		pid, forkErr = syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{
			Dir:   "/",
			Env:   engineEnv(os.Environ()),
			Files: []uintptr{null.Fd(), os.Stdout.Fd(), os.Stderr.Fd()},
			Sys:   &syscall.SysProcAttr{Setpgid: true},
		})
	})
	if err == nil {
		err = forkErr
	}
	if err != nil {
		return nil, fmt.Errorf("start engine %s: %w", argv[0], err)
	}
	return &engine{pid: pid, signals: make(chan syscall.Signal), exited: make(chan syscall.WaitStatus, 1)}, nil
}

// engineEnv leaves out what systemd told this process.
func engineEnv(env []string) []string {
	var kept []string
	for _, v := range env {
		switch key, _, _ := strings.Cut(v, "="); key {
		case "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES":
		default:
			kept = append(kept, v)
		}
	}
	return kept
}

// reap waits for all children, which for PID 1 are also the orphans of the
// engine's, until ctx ends. Children is the channel of SIGCHLD and holds at
// least one place.
func (e *engine) reap(ctx context.Context, children <-chan os.Signal) {
	running := true
	for {
		for {
			var ws syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
			if err == syscall.EINTR {
				continue
			}
			if err != nil || pid <= 0 {
				break
			}
			if pid == e.pid && running {
				running = false
				e.exited <- ws
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-children:
		case s := <-e.signals:
			if running {
				syscall.Kill(e.pid, s) // cannot fail: it is our child, and not reaped
			}
		}
	}
}

// signal signals the engine unless it has ended, or ctx has.
func (e *engine) signal(ctx context.Context, s syscall.Signal) {
	select {
	case <-ctx.Done():
	case e.signals <- s:
	}
}

// exitCode is the bridge's for an engine that ended by itself.
func exitCode(ws syscall.WaitStatus) int {
	switch {
	case ws.Signaled():
		return 128 + int(ws.Signal())
	case ws.ExitStatus() == contract.ExitStopped, ws.ExitStatus() == contract.ExitSandbox, ws.ExitStatus() == contract.ExitConfig:
		return contract.ExitEngine
	}
	return ws.ExitStatus()
}

func describe(ws syscall.WaitStatus) string {
	if ws.Signaled() {
		return fmt.Sprintf("engine was ended by signal %d (%s)", int(ws.Signal()), ws.Signal())
	}
	return fmt.Sprintf("engine ended with exit code %d", ws.ExitStatus())
}
