package bridge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

// launch is what the bridge's own program is told that becomes the engine.
type launch struct {
	Order  sandbox.Order
	Hide   []string // directories
	Resign bool     // it has capabilities, in a user namespace of its own
	Argv   []string
}

// launched is its answer where it does not become the engine.
type launched struct {
	Hiding bool // failed, and nothing else was tried
	Error  string
}

// launchFD is the descriptor over which both go.
const launchFD = 3

// startEngine starts the engine in a process group of its own, confined by
// [sandbox.Confine], in a directory where nobody can put files, and without a way
// to speak to systemd or to the agent: it does not see the directories of their
// sockets, if hiding them is possible here, which hidden says.
//
// Systemd would take WATCHDOG=1 from any process of the unit, and a flood of
// messages keeps it from everything else. No filter looks at the path that a
// socket is connected to, and the engine's user is the bridge's.
func startEngine(argv []string, order sandbox.Order, hide []string) (e *engine, hidden error, err error) {
	e, hidden, err = startLaunch(launch{order, hide, true, argv}, sandbox.Beside())
	if hidden != nil {
		e, _, err = startLaunch(launch{order, nil, false, argv}, &syscall.SysProcAttr{})
	}
	if err != nil {
		return nil, hidden, fmt.Errorf("start engine %s: %w", argv[0], err)
	}
	return e, hidden, nil
}

// startLaunch starts this program again and waits until it has become the engine,
// or has not. The first error is that of the namespaces and of hiding.
func startLaunch(l launch, attr *syscall.SysProcAttr) (e *engine, hiding, err error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, nil, err
	}
	defer null.Close()
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "launch"), os.NewFile(uintptr(pair[1]), "launch")
	defer ours.Close()
	attr.Setpgid = true
	// Not os/exec: this process reaps all children itself.
	pid, err := traceable(func() (int, error) {
		return syscall.ForkExec("/proc/self/exe", []string{os.Args[0], contract.LaunchCommand}, &syscall.ProcAttr{
			Dir:   "/",
			Env:   engineEnv(os.Environ()),
			Files: []uintptr{null.Fd(), os.Stdout.Fd(), os.Stderr.Fd(), theirs.Fd()},
			Sys:   attr,
		})
	})
	theirs.Close()
	if err != nil {
		return nil, err, err
	}
	var answer launched
	if err = json.NewEncoder(ours).Encode(l); err == nil {
		if err = json.NewDecoder(ours).Decode(&answer); err == io.EOF { // closed by exec
			return &engine{pid: pid, signals: make(chan syscall.Signal), exited: make(chan syscall.WaitStatus, 1)}, nil, nil
		}
	}
	_ = syscall.Kill(pid, syscall.SIGKILL) // it has ended, or should
	var ws syscall.WaitStatus
	for {
		if _, werr := syscall.Wait4(pid, &ws, 0, nil); werr != syscall.EINTR {
			break
		}
	}
	if err == nil {
		err = errors.New(answer.Error)
	}
	if answer.Hiding {
		return nil, err, err
	}
	return nil, nil, err
}

// traceable has f run while this process may be looked into by others of its user,
// since the kernel demands that of who makes a user namespace. There are no others
// yet; what f starts waits for its orders.
func traceable(f func() (int, error)) (pid int, err error) {
	if err := setDumpable(1); err != nil {
		return 0, err
	}
	pid, err = f()
	if undo := setDumpable(0); undo != nil && err == nil {
		_ = syscall.Kill(pid, syscall.SIGKILL) // the bridge ends, and all with it
		err = undo
	}
	return pid, err
}

func setDumpable(to uintptr) error {
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, syscall.PR_SET_DUMPABLE, to, 0); errno != 0 {
		return fmt.Errorf("set whether this process can be traced: %w", errno)
	}
	return nil
}

// Launch is the bridge's program on its way to become the engine, see
// [contract.LaunchCommand]. It returns, with an exit code, only if it does not.
func Launch() int {
	syscall.CloseOnExec(launchFD)
	bridge := os.NewFile(launchFD, "launch")
	var l launch
	err := json.NewDecoder(bridge).Decode(&l)
	answer := launched{}
	if err == nil {
		if err = sandbox.Hide(l.Hide); err != nil {
			answer.Hiding = true
		}
	}
	if err == nil {
		var failed error
		_, err = sandbox.Confine(l.Order, func() {
			if failed = sandbox.Bound(); failed != nil {
				return
			}
			if l.Resign {
				if failed = sandbox.Resign(); failed != nil {
					return
				}
			}
			failed = syscall.Exec(l.Argv[0], l.Argv, os.Environ())
		})
		if err == nil {
			err = failed
		}
	}
	answer.Error = err.Error()
	_ = json.NewEncoder(bridge).Encode(answer) // without it the bridge sees that there is no engine
	return contract.ExitConfig
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
