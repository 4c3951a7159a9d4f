package hostile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Ways to change or to see what is not its own.
var files = []attempt{
	{name: "files and sockets of the host", want: absent, do: func(w Where) answers {
		return each(w.Files, func(name string) error {
			if err := dial("unix", name, "x"); err == nil || errors.Is(err, syscall.ECONNREFUSED) {
				return err
			}
			_, err := os.ReadFile(name)
			return err
		})
	}},
	{name: "writing in every mounted place", want: append(readOnly, absent...), do: func(Where) answers {
		a := answers{}
		for _, m := range mounts() {
			switch m {
			case "/tmp", "/dev/shm", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty":
				continue
			}
			info, err := os.Stat(m)
			if err == nil && !info.IsDir() {
				err = touch(m)
			} else if err == nil {
				err = create(m + "/hostile")
			}
			if err == nil && masks(m) { // the null device stands in for what is hidden
				continue
			}
			a.add(answer(err), m)
		}
		return a
	}},
	{name: "writing in the image", want: readOnly, do: func(Where) answers {
		a := answers{}
		for _, dir := range []string{"/", "/etc", "/usr", "/usr/bin", "/var", "/var/tmp", "/run", "/dev", "/root", "/home", "/lib"} {
			if _, err := os.Stat(dir); err == nil {
				a.add(answer(create(dir+"/hostile")), dir)
				a.add(answer(os.Mkdir(dir+"/hostile.d", 0o700)), "directory in "+dir)
			}
		}
		return a
	}},
	{name: "the model: writing, renaming, removing, its modes", want: append([]string{"EPERM"}, readOnly...), do: func(Where) answers {
		all, err := filepath.Glob("/models/*")
		if err != nil || len(all) == 0 {
			return one(fmt.Sprint("no model: ", err))
		}
		a := answers{}
		for _, f := range all {
			a.add(answer(touch(f)), "write "+f)
			a.add(answer(os.Remove(f)), "remove "+f)
			a.add(answer(os.Rename(f, f+".hostile")), "rename "+f)
			a.add(answer(os.Chmod(f, 0o666)), "mode of "+f)
			a.add(answer(os.Truncate(f, 0)), "truncate "+f)
		}
		a.add(answer(create("/models/hostile")), "another one")
		return a
	}},
	{name: "the bridge's program", want: append([]string{"EPERM", "ETXTBSY"}, readOnly...), do: func(Where) answers {
		name := "/resultity-bridge"
		if _, err := os.Stat(name); err != nil {
			name = "/proc/self/exe"
		}
		return these(map[string]error{
			"write": touch(name), "remove": os.Remove("/resultity-bridge-not"), "mode": os.Chmod(name, 0o777), "exe": touch("/proc/self/exe"), "replace": os.Rename("/tmp", "/resultity-bridge"),
		})
	}},
	{name: "in the socket's directory: files, links, pipes, sockets, without end", want: append(readOnly, absent...), do: func(Where) answers {
		a := these(map[string]error{
			"file": create(socketDir + "/hostile"), "directory": os.Mkdir(socketDir+"/hostile.d", 0o700), "link": os.Symlink("/run/user", socketDir+"/hostile.l"),
			"pipe": unix.Mkfifo(socketDir+"/hostile.p", 0o600),
		})
		l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Bind(l, &unix.SockaddrUnix{Name: socketDir + "/hostile.s"})
			unix.Close(l)
		}
		a.add(answer(err), "socket")
		for i := range 1000 {
			if err := create(fmt.Sprint(socketDir, "/hostile-", i)); err == nil {
				a.add(worked, "one of many files")
			}
		}
		return a
	}},
	{name: "the socket itself: removed, replaced, renamed, closed to the agent", want: append([]string{"EPERM", "EXDEV"}, append(readOnly, absent...)...), do: func(Where) answers {
		a := answers{}
		err := os.Symlink("/run/user/0/bus", "/tmp/hostile.l")
		if err == nil {
			a.add(answer(os.Rename("/tmp/hostile.l", socket)), "a link in its place")
			os.Remove("/tmp/hostile.l")
		}
		if os.Mkdir("/tmp/hostile.d", 0o700) == nil {
			a.add(answer(os.Rename("/tmp/hostile.d", socket)), "a directory in its place")
			os.Remove("/tmp/hostile.d")
		}
		a.add(answer(os.Link(socket, "/tmp/hostile.s")), "another name")
		a.add(answer(os.Chmod(socket, 0)), "its mode")
		a.add(answer(os.Chmod(socketDir, 0)), "the mode of its directory")
		a.add(answer(unix.Setxattr(socket, "user.hostile", []byte("x"), 0)), "an attribute")
		a.add(answer(unix.UtimesNanoAt(unix.AT_FDCWD, socket, []unix.Timespec{{}, {}}, 0)), "its times")
		a.add(answer(os.Rename(socket, socketDir+"/other.sock")), "its name")
		a.add(answer(os.Remove(socket)), "the socket")
		return a
	}},
	{name: "a program written to /tmp and started", want: []string{"EACCES", "EPERM"}, unit: true, do: func(Where) answers {
		a := answers{}
		for _, dir := range []string{"/tmp", "/dev/shm"} {
			name := dir + "/hostile-program"
			_ = os.WriteFile(name, []byte("#!/proc/self/exe\n"), 0o700)
			a.add(answer(exec.Command(name).Run()), dir)
			os.Remove(name)
		}
		return a
	}},
	{name: "a program of root's with the set-user-ID bit, another with all capabilities", want: []string{"no privileges"}, unit: true, do: func(Where) answers {
		a := answers{}
		for _, name := range []string{SetUID, WithCapabilities} {
			out, err := exec.Command(name, child, "whoami").CombinedOutput()
			switch own, _ := whoami(); {
			case errors.Is(err, syscall.EPERM): // not even started: there are no capabilities to be had
				a.add("no privileges", name)
			case err != nil:
				a.add(fmt.Sprintf("%v: %s", err, out), name)
			case string(out) != own || !strings.Contains(own, "CapEff 0000000000000000"):
				a.add(worked, string(out))
			default:
				a.add("no privileges", name)
			}
		}
		return a
	}},
}

// Programs of the image with rights that the container must not give them; see
// [Image]. Both are the engine itself.
const (
	SetUID           = "/hostile-setuid"
	WithCapabilities = "/hostile-capable"
)

func create(name string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		f.Close()
		os.Remove(name)
	}
	return err
}

// masks says whether the null device is mounted on a place.
func masks(name string) bool {
	var st unix.Stat_t
	return unix.Stat(name, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
}

// whoami tells the user and the capabilities of this process.
func whoami() (string, error) {
	status, err := os.ReadFile("/proc/self/status")
	var b strings.Builder
	for _, key := range []string{"Uid", "Gid", "CapInh", "CapPrm", "CapEff", "CapAmb"} {
		_, rest, _ := bytes.Cut(status, []byte("\n"+key+":\t"))
		line, _, _ := bytes.Cut(rest, []byte("\n"))
		fmt.Fprintf(&b, "%s %s; ", key, bytes.ReplaceAll(line, []byte("\t"), []byte(" ")))
	}
	return b.String(), err
}

// Ways to take all there is of something. None tries for more than the host can
// do without.
var bounds = []attempt{
	{name: "more than the room in /tmp and /dev/shm", want: []string{"ENOSPC"}, unit: true, do: func(Where) answers {
		return each([]string{"/tmp", "/dev/shm"}, func(dir string) error {
			f, err := os.Create(dir + "/hostile-fill")
			if err != nil {
				return err
			}
			defer os.Remove(f.Name())
			defer f.Close()
			b := make([]byte, 1<<20)
			for range 256 {
				if _, err := f.Write(b); err != nil {
					return err
				}
			}
			return nil
		})
	}},
	{name: "threads and processes without end", want: []string{"EAGAIN"}, do: func(Where) answers { return again("threads") }},
	{name: "descriptors without end", want: []string{"EMFILE"}, do: func(Where) answers { return again("descriptors") }},
	{name: "higher limits", want: []string{"EPERM"}, do: func(Where) answers {
		a := answers{}
		for name, resource := range map[string]int{
			"core": unix.RLIMIT_CORE, "nofile": unix.RLIMIT_NOFILE, "nproc": unix.RLIMIT_NPROC, "memlock": unix.RLIMIT_MEMLOCK, "rtprio": unix.RLIMIT_RTPRIO,
			"nice": unix.RLIMIT_NICE, "msgqueue": unix.RLIMIT_MSGQUEUE,
		} {
			var r unix.Rlimit
			if err := unix.Prlimit(0, resource, nil, &r); err != nil || r.Max == unix.RLIM_INFINITY {
				continue
			}
			r.Max++
			a.add(answer(unix.Prlimit(0, resource, &r, nil)), name)
		}
		return a
	}},
	{name: "core dumps", want: []string{"none"}, unit: true, do: func(Where) answers {
		var r unix.Rlimit
		if err := unix.Prlimit(0, unix.RLIMIT_CORE, nil, &r); err != nil || r.Max != 0 {
			return one(fmt.Sprintf("limit %d, %v", r.Max, err))
		}
		return one("none")
	}},
	{name: "precedence over the host: real time, niceness, the out-of-memory killer", want: refused, do: func(Where) answers {
		param := [2]int32{50}
		return these(map[string]error{
			"real time": call(unix.SYS_SCHED_SETSCHEDULER, 0, unix.SCHED_FIFO, ptr(&param)),
			"niceness":  unix.Setpriority(unix.PRIO_PROCESS, 0, -20),
			"killer":    os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0),
		})
	}},
	{name: "memory that cannot be swapped, all of it", want: []string{"ENOMEM", "EPERM", "EAGAIN"}, do: single(func() error {
		b, err := unix.Mmap(-1, 0, 256<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
		if err != nil {
			return err
		}
		defer unix.Munmap(b)
		return unix.Mlock(b)
	})},
}

// again starts the engine once more, to take something without end, and returns
// how that ended.
func again(what string) answers {
	out, err := exec.Command("/proc/self/exe", child, what).CombinedOutput()
	for _, m := range []*regexp.Regexp{limitOfThreads, limitOfFiles} {
		if s := m.FindSubmatch(out); s != nil {
			n, _ := strconv.Atoi(string(s[2])) // digits
			return one(unix.ErrnoName(syscall.Errno(n)))
		}
	}
	if bytes.Contains(out, []byte("pthread_create failed: Resource temporarily unavailable")) { // the same, with cgo
		return one("EAGAIN")
	}
	if err == nil {
		return one(worked + ": " + strings.TrimSpace(string(out)))
	}
	return one(fmt.Sprintf("%v: %.300s", err, out))
}

var (
	// Go's runtime says this when it gets no thread.
	limitOfThreads = regexp.MustCompile(`failed to create new OS thread \(have (\d+) already; errno=(\d+)\)`)
	limitOfFiles   = regexp.MustCompile(`after (\d+) descriptors: errno (\d+)`)
)

// child is the first argument of an engine that was started by itself.
const child = "hostile-child"

// most is how many threads or descriptors are tried for. The bridge gives fewer.
const (
	mostThreads     = 5000
	mostDescriptors = 100_000
)

// Again does what the engine has started itself for with these arguments, if it
// has: it takes something without end.
func Again(args []string) bool { return asChild(args, os.Stdout) }

func asChild(args []string, stdout io.Writer) bool {
	if len(args) != 3 || args[1] != child {
		return false
	}
	switch args[2] {
	case "whoami":
		s, err := whoami()
		if err != nil {
			s = err.Error()
		}
		fmt.Fprint(stdout, s)
	case "threads":
		threads()
		fmt.Fprintf(stdout, "%d threads", mostThreads)
	case "descriptors":
		var r unix.Rlimit
		_ = unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &r) // the opening says it
		r.Cur = r.Max
		_ = unix.Prlimit(0, unix.RLIMIT_NOFILE, &r, nil)
		for i := range mostDescriptors {
			if _, err := unix.Open("/dev/null", unix.O_RDONLY, 0); err != nil {
				var errno syscall.Errno
				errors.As(err, &errno)
				fmt.Fprintf(stdout, "after %d descriptors: errno %d", i, errno)
				return true
			}
		}
		fmt.Fprintf(stdout, "%d descriptors", mostDescriptors)
	}
	return true
}
