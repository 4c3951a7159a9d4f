package bridge

import (
	"fmt"
	"net"
	"strings"
	"time"
)

// notifier sends messages to systemd. Its methods may be called concurrently.
type notifier struct {
	socket string // NOTIFY_SOCKET; "" when nobody listens
}

// maxStatus bounds a status line, in bytes; systemctl shows one line of it.
const maxStatus = 200

// send sends the assignments in one message. It opens the socket anew each
// time, so that a listener that was replaced is found again, and gives up
// after a while when nobody reads: a datagram to a full socket waits.
func (n notifier) send(assignments ...string) error {
	if n.socket == "" {
		return nil
	}
	c, err := net.DialTimeout("unixgram", n.socket, notifyPatience)
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	defer c.Close()
	if err := c.SetWriteDeadline(time.Now().Add(notifyPatience)); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	if _, err := c.Write([]byte(strings.Join(assignments, "\n"))); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}

// notifyPatience is for one message. Tests have less.
var notifyPatience = 5 * time.Second

// status is the assignment of a status line.
func status(format string, args ...any) string {
	line := strings.Map(func(r rune) rune {
		if r < ' ' {
			return ' ' // a line break would begin another assignment
		}
		return r
	}, fmt.Sprintf(format, args...))
	if len(line) > maxStatus {
		line = strings.ToValidUTF8(line[:maxStatus], "")
	}
	return "STATUS=" + line
}
