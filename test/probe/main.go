// Command probe is run inside a runtime container and tries what nothing in
// there may do. It prints one line an attempt and ends with 1 if any of them
// worked.
//
//	probe ADDRESS:PORT
//
// The address is one that a process outside of the container reaches.
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

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: probe ADDRESS:PORT")
		os.Exit(64)
	}
	outside := os.Args[1]
	bad := 0
	try := func(what string, f func() error) {
		err := f()
		if err == nil {
			bad++
			fmt.Printf("WORKED   %s\n", what)
			return
		}
		fmt.Printf("refused  %s: %v\n", what, err)
	}
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
	try("enter a new user namespace", func() error {
		p, err := os.StartProcess("/proc/self/exe", nil, &os.ProcAttr{Sys: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER}})
		if err != nil {
			return err
		}
		_, err = p.Wait()
		return err
	})
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
	if bad > 0 {
		fmt.Printf("%d attempts worked\n", bad)
		os.Exit(1)
	}
}

func socket(family, kind, protocol int) error {
	fd, err := syscall.Socket(family, kind, protocol)
	if err != nil {
		return err
	}
	return syscall.Close(fd)
}
