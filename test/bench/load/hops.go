package load

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// A token goes from the engine's bridge to the agent over a unix socket, from
// there to the network and to the client over TLS. hops is this way with
// nothing on it: a source that writes the time, and in between as many programs
// as asked for that pass bytes on. What they take is the machine's: to wake a
// program, and to encrypt.
const (
	hopPace  = 2 * time.Millisecond
	hopCount = 200
	hopLimit = 30 * time.Second
)

// hops measures the way of each stamp in microseconds.
func hops(ctx context.Context, relays int) (a answer, err error) {
	ctx, cancel := context.WithTimeout(ctx, hopLimit)
	defer cancel()
	dir, err := os.MkdirTemp("", "hops-")
	if err != nil {
		return a, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	l, next, err := listen(dir, relays > 0)
	if err != nil {
		return a, err
	}
	defer l.Close() // nothing comes after the one connection
	defer context.AfterFunc(ctx, func() { l.Close() })()
	var children []*exec.Cmd
	defer func() {
		cancel()
		for _, c := range children {
			_ = c.Wait() // killed, or ended with its input
		}
	}()
	for i := relays; i > 0; i-- {
		c := exec.CommandContext(ctx, os.Args[0], "relay", next, strconv.FormatBool(i > 1), dir)
		out, err := c.StdoutPipe()
		if err != nil {
			return a, err
		}
		if err := c.Start(); err != nil {
			return a, err
		}
		children = append(children, c)
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			return a, fmt.Errorf("relay: %w", err)
		}
		next = strings.TrimSpace(line)
	}
	source := exec.CommandContext(ctx, os.Args[0], "source", next)
	if err := source.Start(); err != nil {
		return a, err
	}
	children = append(children, source)
	conn, err := l.Accept()
	if err != nil {
		return a, err
	}
	defer conn.Close() // read to its end
	for lines := bufio.NewScanner(conn); len(a.tokens) < hopCount; {
		if !lines.Scan() {
			return a, fmt.Errorf("%d of %d stamps came: %w", len(a.tokens), hopCount, errors.Join(lines.Err(), io.ErrUnexpectedEOF))
		}
		at := time.Now()
		ns, err := strconv.ParseInt(lines.Text(), 10, 64)
		if err != nil {
			return a, err
		}
		a.tokens = append(a.tokens, micros(at.Sub(time.Unix(0, ns))))
	}
	return a, nil
}

// Source writes the time to address until nobody reads any more.
func Source(address string) error {
	conn, err := dial(address)
	if err != nil {
		return err
	}
	for tick := time.Tick(hopPace); ; <-tick {
		if _, err := conn.Write(append(strconv.AppendInt(nil, time.Now().UnixNano(), 10), '\n')); err != nil {
			return nil
		}
	}
}

// Relay prints where it listens, and passes what comes there on to next.
func Relay(next string, secure bool, dir string) error {
	l, address, err := listen(dir, secure)
	if err != nil {
		return err
	}
	fmt.Println(address)
	to, err := dial(next) // ends when next accepts, and that waits for the line above
	if err != nil {
		return err
	}
	from, err := l.Accept()
	if err != nil {
		return err
	}
	_, _ = io.Copy(struct{ io.Writer }{to}, struct{ io.Reader }{from}) // either end may go first
	return nil
}

// listen listens on a unix socket in dir, or secure on TLS, and returns what
// dial takes.
func listen(dir string, secure bool) (net.Listener, string, error) {
	if !secure {
		path := filepath.Join(dir, "first.sock")
		l, err := net.Listen("unix", path)
		return l, path, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, "", err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, "", err
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}}})
	if err != nil {
		return nil, "", err
	}
	return l, l.Addr().String(), nil
}

func dial(address string) (net.Conn, error) {
	if filepath.IsAbs(address) {
		return net.Dial("unix", address)
	}
	// It is the time of encryption that counts here; there is nobody to be told
	// apart from another.
	return tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
}
