package stack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/resultity/node/test/host"
)

// A Machine runs services or a node: a [host.Host], or the one that this
// program runs on, in the account of whoever started it.
type Machine interface {
	Name() string
	Addr() netip.Addr
	Exec(ctx context.Context, c host.Cmd) error
	Output(ctx context.Context, args ...string) ([]byte, error)
	OutputAs(ctx context.Context, user string, args ...string) ([]byte, error)
	ReadFile(name string) ([]byte, error)
	WriteFile(name string, data []byte, mode os.FileMode) error
	CopyTo(src, dst string) error
}

// site is a machine, and where on it things are.
type site struct {
	Machine
	prefix  string   // before the path of everything that is installed
	units   string   // where unit files of services go
	unit    string   // before the names of these units
	ctl     []string // systemctl, for the manager of these units
	start   []string // its command that starts a unit
	address string   // that services listen on; empty for all

	networkPort, metricsPort, registryPort, modelPort string
}

// hostSite is a host that is all ours.
func hostSite(h *host.Host) site {
	return site{
		Machine: h, units: "/etc/systemd/system", ctl: []string{"systemctl"}, start: []string{"enable", "--now"},
		networkPort: "8443", metricsPort: "9464", registryPort: "5000", modelPort: "9443",
	}
}

func (s *site) path(name string) string { return filepath.Join(s.prefix, name) }

func (s *site) listen(port string) string { return net.JoinHostPort(s.address, port) }

// service runs a program as a service.
func (s *site) service(ctx context.Context, name string, args ...string) error {
	unit := s.unit + name + ".service"
	text := "[Unit]\nDescription=" + name + "\n[Service]\nRestart=on-failure\nExecStart=" + strings.Join(args, " ") + "\n[Install]\nWantedBy=multi-user.target\n"
	if err := s.WriteFile(filepath.Join(s.units, unit), []byte(text), 0o644); err != nil {
		return err
	}
	if err := s.systemctl(ctx, "daemon-reload"); err != nil {
		return err
	}
	return s.systemctl(ctx, append(s.start, unit)...)
}

func (s *site) systemctl(ctx context.Context, args ...string) error {
	if out, err := s.Output(ctx, append(s.ctl[:len(s.ctl):len(s.ctl)], args...)...); err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// place writes files, all readable by everybody.
func place(m Machine, files map[string][]byte) error {
	var errs []error
	for name, data := range files {
		errs = append(errs, m.WriteFile(name, data, 0o644))
	}
	return errors.Join(errs...)
}
