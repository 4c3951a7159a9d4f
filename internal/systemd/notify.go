package systemd

import (
	"context"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// The calls below do nothing where no service manager listens, as in a
// developer's terminal.

// Ready says that the service is up.
func Ready(status string) error { return notify(daemon.SdNotifyReady, statusLine(status)) }

// Stopping says that the service is on its way down.
func Stopping(status string) error { return notify(daemon.SdNotifyStopping, statusLine(status)) }

// Status sets the line that systemctl status shows.
func Status(status string) error { return notify(statusLine(status)) }

func notify(lines ...string) error {
	_, err := daemon.SdNotify(false, strings.Join(lines, "\n"))
	return err
}

// maxStatus bounds the status line, which the manager keeps in memory.
const maxStatus = 512

// statusLine makes one line of any text: a second one would be another
// message, and the manager believes those.
func statusLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
	if len(s) > maxStatus {
		s = strings.ToValidUTF8(s[:maxStatus], "") + "…"
	}
	return "STATUS=" + s
}

// Watchdog tells the manager at a third of its interval that the service is
// alive, as long as alive says so, until ctx ends. Where the unit has no
// WatchdogSec= it only waits.
func Watchdog(ctx context.Context, alive func() bool) error {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return err
	}
	if interval == 0 {
		<-ctx.Done()
		return nil
	}
	t := time.NewTicker(interval / 3)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			if !alive() {
				continue
			}
			if err := notify(daemon.SdNotifyWatchdog); err != nil {
				return err
			}
		}
	}
}
