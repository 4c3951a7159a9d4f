package systemd

import (
	"context"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// The calls below do nothing where no service manager listens, as in a
// developer's terminal.

// Ready says that the service is up.
func Ready(status string) error {
	_, err := daemon.SdNotify(false, daemon.SdNotifyReady+"\nSTATUS="+status)
	return err
}

// Reloading says that the configuration is being read again; Ready ends it.
func Reloading() error {
	_, err := daemon.SdNotify(false, daemon.SdNotifyReloading+"\n"+daemon.SdNotifyMonotonicUsec())
	return err
}

// Stopping says that the service is on its way down.
func Stopping(status string) error {
	_, err := daemon.SdNotify(false, daemon.SdNotifyStopping+"\nSTATUS="+status)
	return err
}

// Status sets the line that systemctl status shows.
func Status(status string) error {
	_, err := daemon.SdNotify(false, "STATUS="+status)
	return err
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
			if _, err := daemon.SdNotify(false, daemon.SdNotifyWatchdog); err != nil {
				return err
			}
		}
	}
}
