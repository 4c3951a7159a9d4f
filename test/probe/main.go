// Command probe is run inside a runtime container and tries what nothing in
// there may do. It prints one line an attempt and ends with 1 if any of them
// worked.
//
//	probe ADDRESS:PORT
//
// The address is one that a process outside of the container reaches. Podman
// lets a container make user namespaces, so what their root can do is tried,
// too.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// asRoot is the second argument of the probe that runs as the root of a user
// namespace of its own.
const asRoot = "as-root"

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: probe ADDRESS:PORT")
		os.Exit(64)
	}
	p := probe{outside: os.Args[1]}
	if len(os.Args) > 2 && os.Args[2] == asRoot {
		p.asRoot()
	} else {
		p.asEngine()
		p.again()
	}
	if p.bad > 0 {
		fmt.Printf("%d attempts worked\n", p.bad)
		os.Exit(1)
	}
}

type probe struct {
	outside string
	bad     int
}

func (p *probe) try(what string, f func() error) {
	if err := f(); err != nil {
		fmt.Printf("refused  %s: %v\n", what, err)
		return
	}
	p.bad++
	fmt.Printf("WORKED   %s\n", what)
}

// again starts the probe anew with every right that a process can give itself.
func (p *probe) again() {
	one := func(id int) []syscall.SysProcIDMap { return []syscall.SysProcIDMap{{HostID: id, Size: 1}} }
	proc, err := os.StartProcess("/proc/self/exe", []string{"probe", p.outside, asRoot}, &os.ProcAttr{
		Files: []*os.File{nil, os.Stdout, os.Stderr},
		Sys: &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: one(os.Getuid()), GidMappings: one(os.Getgid()),
		},
	})
	if err != nil {
		fmt.Printf("refused  become root of a user namespace: %v\n", err)
		return
	}
	if st, err := proc.Wait(); err != nil || !st.Success() {
		fmt.Printf("as root of a user namespace: %v, %v\n", st, err)
		p.bad++
	}
}

// asRoot tries what a user namespace could help with. Mounting over things is
// not among it: that changes what this process sees, and nothing else.
func (p *probe) asRoot() {
	const how = "as root of a user namespace, "
	for _, dir := range []string{"/", "/models", "/resultity-bridge"} {
		p.try(how+"make "+dir+" writable", func() error {
			return syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_BIND, "")
		})
	}
	p.try(how+"mount a proc that shows all", func() error { return syscall.Mount("proc", "/tmp", "proc", 0, "") })
	p.try(how+"make a device", func() error { return syscall.Mknod("/tmp/sda", syscall.S_IFBLK|0o600, 8<<8) })
	p.try(how+"open a raw socket", func() error { return socket(syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_ICMP) })
	p.try(how+"change the clock", func() error { return syscall.Settimeofday(&syscall.Timeval{Sec: 1}) })
	p.try(how+"connect by TCP to "+p.outside, func() error {
		c, err := net.DialTimeout("tcp", p.outside, 5*time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// asEngine tries what the engine could.
func (p *probe) asEngine() {
	outside, try := p.outside, p.try
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	dial := func(network, addr string) func() error {
		return func() error {
			c, err := new(net.Dialer).DialContext(ctx, network, addr)
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte("x")) // connecting says nothing on a datagram socket
			return err
		}
	}
	try("connect by TCP to "+outside, dial("tcp", outside))
	try("send by UDP to "+outside, dial("udp", outside))
	try("look up a name", func() error { _, err := new(net.Resolver).LookupHost(ctx, "example.com"); return err })
	try("open a packet socket", func() error { return socket(syscall.AF_PACKET, syscall.SOCK_RAW, 0) })
	try("open a raw socket", func() error { return socket(syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_ICMP) })
	try("see another interface than lo", func() error {
		ifs, err := net.Interfaces()
		if err != nil {
			return err
		}
		if len(ifs) == 1 && ifs[0].Name == "lo" {
			return fmt.Errorf("only lo")
		}
		return nil
	})
	for _, dir := range []string{"/", "/etc", "/usr/bin", "/models", "/sys", "/sys/fs/cgroup", "/var"} {
		try("write in "+dir, func() error {
			f, err := os.OpenFile(filepath.Join(dir, "probe-was-here"), os.O_CREATE|os.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			return f.Close()
		})
	}
	try("change a kernel setting", func() error { return os.WriteFile("/proc/sys/kernel/hostname", []byte("x"), 0o644) })
	try("replace the bridge", func() error { return os.WriteFile("/resultity-bridge", []byte("x"), 0o755) })
	try("read the host's shadow file", func() error { _, err := os.ReadFile("/proc/1/root/etc/shadow"); return err })
	try("mount a file system", func() error { return syscall.Mount("none", "/tmp", "tmpfs", 0, "") })
	try("start a program from the models", func() error {
		f, err := os.Open("/models")
		if err != nil {
			return err
		}
		defer f.Close()
		var st syscall.Statfs_t
		if err := syscall.Fstatfs(int(f.Fd()), &st); err != nil {
			return err
		}
		if st.Flags&8 != 0 { // ST_NOEXEC
			return fmt.Errorf("mounted noexec")
		}
		return nil
	})
	try("trace the bridge", func() error { return syscall.PtraceAttach(1) })
	try("become root", func() error { return syscall.Setuid(0) })
	try("make a device", func() error { return syscall.Mknod("/tmp/sda", syscall.S_IFBLK|0o600, 8<<8) })
	try("change the clock", func() error { return syscall.Settimeofday(&syscall.Timeval{Sec: 1}) })
}

func socket(family, kind, protocol int) error {
	fd, err := syscall.Socket(family, kind, protocol)
	if err != nil {
		return err
	}
	return syscall.Close(fd)
}
