// Host is the command line of the test hosts. Its hosts last until they are
// taken down. A command run on one passes its exit status on, which go run in
// turn does not: build this program where that matters.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/resultity/node/test/host"
)

const usage = `usage: host [-lab NAME] COMMAND

  up NAME [-release trixie|forky] [-role node|network]   make a host and boot it
  exec NAME [-user USER] [--] COMMAND [ARG]...           run a command on it
  copy SRC DST                                           copy; one of the two is NAME:PATH
  cut NAME, heal NAME                                    make its packets vanish; undo that
  kill NAME, boot NAME                                   cut its power; start it again
  reboot NAME                                            shut it down and start it again
  list                                                   show all hosts of all labs
  down NAME... | -all                                    remove hosts
  prepare [-release R] [-role R]                         build a root file system
  gc [-all]                                              remove what dead processes left, or all

Hosts of one lab reach each other by name. The machine reaches them, too, if
the lab was made here.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		os.Exit(exit.ExitCode()) // a command on a host; it has said what there is to say
	default:
		fmt.Fprintln(os.Stderr, "host:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	var (
		fl      = flag.NewFlagSet("host", flag.ContinueOnError)
		lab     = fl.String("lab", "default", "")
		user    = fl.String("user", "", "")
		release = fl.String("release", "", "")
		role    = fl.String("role", "", "")
		all     = fl.Bool("all", false, "")
	)
	fl.Usage = func() {}
	// word takes flags and then a word, so that flags may stand on both sides
	// of the command and of the host's name.
	word := func() (string, error) {
		if err := fl.Parse(args); err != nil {
			return "", err
		}
		args = fl.Args()
		if len(args) == 0 {
			return "", flag.ErrHelp
		}
		w := args[0]
		args = args[1:]
		return w, nil
	}
	command, err := word()
	if err != nil {
		return err
	}
	switch command {
	case "list", "gc", "prepare", "down":
		if err := fl.Parse(args); err != nil {
			return err
		}
		args = fl.Args()
	case "copy":
		src, err := word()
		if err != nil {
			return err
		}
		dst, err := word()
		if err != nil {
			return err
		}
		return doCopy(*lab, src, dst)
	case "up", "exec", "cut", "heal", "kill", "boot", "reboot":
	default:
		return flag.ErrHelp
	}
	switch command {
	case "list":
		return list(stdout)
	case "gc":
		removed, err := host.GC(ctx, *all)
		for _, name := range removed {
			fmt.Fprintln(stdout, "removed", name)
		}
		return err
	case "prepare":
		return host.Prepare(ctx, stderr, host.Image{Release: host.Release(*release), Role: host.Role(*role)})
	case "down":
		return down(ctx, *lab, args, *all)
	}

	name, err := word()
	if err != nil {
		return err
	}
	if err := fl.Parse(args); err != nil {
		return err
	}
	args = fl.Args()
	if command == "up" {
		return up(ctx, stderr, *lab, host.Config{Name: name, Release: host.Release(*release), Role: host.Role(*role)})
	}
	l, err := host.Open(*lab, stderr)
	if err != nil {
		return err
	}
	h, err := l.Host(name)
	if err != nil {
		return err
	}
	switch command {
	case "exec":
		return h.Exec(ctx, host.Cmd{User: *user, Args: args, Stdin: stdin, Stdout: stdout, Stderr: stderr})
	case "cut":
		return h.Cut(ctx)
	case "heal":
		return h.Heal(ctx)
	case "kill":
		return h.Kill(ctx)
	case "boot":
		return h.Boot(ctx)
	default:
		return h.Reboot(ctx)
	}
}

func up(ctx context.Context, progress io.Writer, lab string, c host.Config) error {
	l, err := host.Create(ctx, host.Options{Name: lab, Keep: true, Reachable: true, Progress: progress})
	if errors.Is(err, fs.ErrExist) {
		l, err = host.Open(lab, progress)
	}
	if err != nil {
		return err
	}
	_, err = l.Up(ctx, c)
	return err
}

// down removes the named hosts or all, and the lab with the last one.
func down(ctx context.Context, lab string, names []string, all bool) error {
	l, err := host.Open(lab, nil)
	if err != nil {
		return err
	}
	if len(names) == 0 && !all {
		return flag.ErrHelp
	}
	for _, name := range names {
		h, err := l.Host(name)
		if err != nil {
			return err
		}
		if err := h.Down(ctx); err != nil {
			return err
		}
	}
	left, err := l.Hosts()
	if err != nil {
		return err
	}
	if len(left) > 0 && !all {
		return nil
	}
	return l.Close()
}

func list(stdout io.Writer) error {
	labs, err := host.Labs()
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "LAB\tHOST\tRELEASE\tROLE\tADDRESS\tPID\tNETWORK")
	for _, lab := range labs {
		l, err := host.Open(lab, nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		hosts, err := l.Hosts()
		if err != nil {
			return err
		}
		for _, h := range hosts {
			s, err := h.Status()
			if errors.Is(err, fs.ErrNotExist) {
				continue
			} else if err != nil {
				return err
			}
			pid, network := fmt.Sprint(s.PID), "up"
			if s.PID == 0 {
				pid = "down"
			}
			if s.Cut {
				network = "cut"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", lab, h.Name(), s.Release, s.Role, h.Addr(), pid, network)
		}
	}
	return w.Flush()
}

// doCopy copies between the machine and a host. As with cp, a destination that
// ends in a slash or is a directory of the machine takes the source's name.
func doCopy(lab, src, dst string) error {
	srcHost, srcPath, from := strings.Cut(src, ":")
	dstHost, dstPath, to := strings.Cut(dst, ":")
	if from == to {
		return fmt.Errorf("copy %s %s: exactly one of the two must be NAME:PATH", src, dst)
	}
	l, err := host.Open(lab, nil)
	if err != nil {
		return err
	}
	if to {
		h, err := l.Host(dstHost)
		if err != nil {
			return err
		}
		if strings.HasSuffix(dstPath, "/") {
			dstPath = path.Join(dstPath, filepath.Base(src))
		}
		return h.CopyTo(src, dstPath)
	}
	h, err := l.Host(srcHost)
	if err != nil {
		return err
	}
	if fi, err := os.Stat(dst); err == nil && fi.IsDir() {
		dst = filepath.Join(dst, path.Base(srcPath))
	}
	return h.CopyFrom(srcPath, dst)
}
