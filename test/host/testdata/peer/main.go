// Peer is what the tests run on hosts and in containers. It needs no library
// and no file.
//
//	peer echo ADDRESS   says "ready", then sends back what it gets, by TCP
//	peer talk ADDRESS   sends its input there, by one connection, and prints the answers
//	peer dial ADDRESS D connects, within duration D, and prints what happened
//	peer stay           prints its network interfaces and waits to be killed
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func run(what string, args []string) error {
	switch what {
	case "echo":
		l, err := net.Listen("tcp", args[0])
		if err != nil {
			return err
		}
		fmt.Println("ready")
		for {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	case "talk":
		c, err := net.Dial("tcp", args[0])
		if err != nil {
			return err
		}
		defer c.Close()
		answers := make(chan error, 1)
		go func() {
			_, err := io.Copy(os.Stdout, c)
			answers <- err
		}()
		if _, err := io.Copy(c, os.Stdin); err != nil {
			return err
		}
		return errors.Join(c.(*net.TCPConn).CloseWrite(), <-answers)
	case "dial":
		d, err := time.ParseDuration(args[1])
		if err != nil {
			return err
		}
		c, err := net.DialTimeout("tcp", args[0], d)
		if e := net.Error(nil); errors.As(err, &e) && e.Timeout() {
			fmt.Println("timeout")
			return nil
		}
		if errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ECONNREFUSED) {
			fmt.Println(err)
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Println("connected")
		return c.Close()
	case "stay":
		links, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, l := range links {
			fmt.Println("interface", l.Name)
		}
		time.Sleep(time.Hour)
		return nil
	}
	return fmt.Errorf("%q: unknown", what)
}
