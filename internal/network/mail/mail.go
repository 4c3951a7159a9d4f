// Package mail owns the way of a message from the network service to a mail
// server.
//
// The rule it keeps: what it has taken is sent, or its time has run out; a
// restart in between changes nothing. An address reaches the mail server and
// nobody else: it is in no log, not even in what the server answers. Nothing
// that somebody sent us becomes part of a message but an address of one
// spelling, so that nobody can add a header.
package mail

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"mime/quotedprintable"
	"net"
	"net/mail"
	"net/smtp"
	"net/textproto"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/resultity/node/internal/durable"
)

// ErrAddress says that a text is no address that mail is sent to.
var ErrAddress = errors.New("not an e-mail address of the form name@domain")

var (
	localPart = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*$")
	domain    = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$`)
)

// ParseAddress reads an address in its plain spelling: no name, no comment, no
// quotes, ASCII, within the bounds of SMTP (64 bytes before the @, 254 in all).
func ParseAddress(s string) (string, error) {
	a, err := mail.ParseAddress(s)
	if err != nil || a.Name != "" || a.Address != s || len(s) > 254 {
		return "", ErrAddress
	}
	at := strings.LastIndexByte(s, '@')
	if at > 64 || !localPart.MatchString(s[:at]) || !domain.MatchString(s[at+1:]) {
		return "", ErrAddress
	}
	return s, nil
}

// Security is how the way to the mail server is protected.
type Security string

// The kinds of protection.
const (
	StartTLS Security = "starttls" // plain until the server has agreed to TLS, which it must
	TLS      Security = "tls"      // from the first byte
	None     Security = "none"     // for a server on this machine
)

// Config says which mail server to use.
type Config struct {
	Server   string // host:port
	Security Security
	From     string // name@domain, or Name <name@domain>
	Login    string // file with two lines, user and password; "" for none
	CA       string // PEM file of authorities in place of the system's; "" for those
}

// Sender talks to a mail server. Safe for concurrent use.
type Sender struct {
	server, host string
	security     Security
	from         *mail.Address
	auth         smtp.Auth
	tls          *tls.Config
	name         string // ours
	patience     time.Duration
}

// NewSender checks a configuration. Errors name the key of network.toml.
func NewSender(c Config) (*Sender, error) {
	host, _, err := net.SplitHostPort(c.Server)
	if err != nil || host == "" {
		return nil, fmt.Errorf("smtp: %q: want host:port, such as mail.example.org:587", c.Server)
	}
	s := &Sender{
		server: c.Server, host: host, security: c.Security, patience: time.Minute,
		tls: &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12},
	}
	if s.from, err = mail.ParseAddress(c.From); err == nil {
		_, err = ParseAddress(s.from.Address)
	}
	if err != nil || strings.ContainsAny(c.From, "\r\n") {
		return nil, fmt.Errorf("smtp_from: %q: want name@domain, or Name <name@domain>", c.From)
	}
	switch ip := net.ParseIP(host); {
	case c.Security != StartTLS && c.Security != TLS && c.Security != None:
		return nil, fmt.Errorf("smtp_security: %q: want starttls, tls or none", c.Security)
	case c.Security == None && host != "localhost" && (ip == nil || !ip.IsLoopback()):
		return nil, fmt.Errorf("smtp_security: none is for a mail server on this machine; codes would be read on the way to %s", host)
	case c.Security == None && c.Login != "":
		return nil, errors.New("smtp_login: a password is not sent without TLS; set smtp_security to starttls or tls")
	}
	if c.Login != "" {
		user, password, err := readLogin(c.Login)
		if err != nil {
			return nil, fmt.Errorf("smtp_login: %w", err)
		}
		s.auth = smtp.PlainAuth("", user, password, host)
	}
	if c.CA != "" {
		pem, err := durable.ReadFile(c.CA, maxCA)
		if err != nil {
			return nil, fmt.Errorf("smtp_ca: %w", err)
		}
		s.tls.RootCAs = x509.NewCertPool()
		if !s.tls.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("smtp_ca: %s has no PEM certificate", c.CA)
		}
	}
	if s.name, err = os.Hostname(); err != nil || !domain.MatchString(s.name) {
		s.name = "localhost"
	}
	return s, nil
}

// Bounds of what the operator names, in bytes.
const (
	maxLogin = 4 << 10
	maxCA    = 1 << 20
)

func readLogin(name string) (user, password string, err error) {
	raw, err := durable.ReadSecret(name, maxLogin)
	if err != nil {
		return "", "", err
	}
	user, password, ok := strings.Cut(strings.TrimRight(string(raw), "\r\n"), "\n")
	user = strings.TrimRight(user, "\r")
	if !ok || user == "" || password == "" || strings.Contains(password, "\n") {
		return "", "", fmt.Errorf("%s: want two lines, the user and the password", name)
	}
	return user, password, nil
}

// ErrRejected says that the mail server will not take this message, however
// often it is asked.
var ErrRejected = errors.New("rejected for good")

// Send hands a text to the mail server, for one recipient. [ErrRejected] is
// final; any other error may pass.
func (s *Sender) Send(ctx context.Context, to, subject, text string) (err error) {
	if to, err = ParseAddress(to); err != nil {
		return fmt.Errorf("%w: %w", ErrRejected, err)
	}
	msg, err := s.compose(to, subject, text, time.Now())
	if err != nil {
		return err
	}
	defer func() { err = told(err) }()
	ctx, cancel := context.WithTimeout(ctx, s.patience)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", s.server)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })() // ends whatever waits
	defer conn.Close()
	if s.security == TLS {
		conn = tls.Client(conn, s.tls)
	}
	c, err := smtp.NewClient(conn, s.host)
	if err != nil {
		return err
	}
	if err := c.Hello(s.name); err != nil {
		return err
	}
	if s.security == StartTLS {
		if ok, _ := c.Extension("STARTTLS"); !ok {
			return errors.New("the mail server offers no STARTTLS; set smtp_security to tls if its port speaks TLS from the first byte")
		}
		if err := c.StartTLS(s.tls); err != nil {
			return err
		}
	}
	if s.auth != nil {
		if err := c.Auth(s.auth); err != nil {
			// Not the message's fault, and the operator can mend it.
			return fmt.Errorf("login refused: %v", err)
		}
	}
	if err := c.Mail(s.from.Address); err != nil {
		return fmt.Errorf("sender: %v", err) // neither is this
	}
	if err := c.Rcpt(to); err != nil {
		return err
	}
	w, err := c.Data()
	if err != nil {
		return err
	}
	if _, err := w.Write(msg); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	_ = c.Quit() // it has taken the message
	return nil
}

var anyAddress = regexp.MustCompile(`\S*@\S*`)

// told makes an error of the server's answer that may be logged: mail servers
// like to repeat the address.
func told(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	text = anyAddress.ReplaceAllString(text, "ADDRESS") // before a cut could take the @ from one
	text = strings.ToValidUTF8(text[:min(len(text), 300)], "")
	if p, ok := errors.AsType[*textproto.Error](err); ok && p.Code >= 500 {
		return fmt.Errorf("%w: %s", ErrRejected, text)
	}
	return errors.New(text)
}

// compose writes the message. Everything but the addresses is ours.
func (s *Sender) compose(to, subject, text string, now time.Time) ([]byte, error) {
	if strings.ContainsAny(subject, "\r\n") {
		return nil, errors.New("a subject of two lines")
	}
	var b bytes.Buffer
	_, host, _ := strings.Cut(s.from.Address, "@")
	for _, h := range [][2]string{
		{"From", s.from.String()}, {"To", "<" + to + ">"}, {"Subject", subject},
		{"Date", now.UTC().Format(time.RFC1123Z)}, {"Message-ID", "<" + strings.ToLower(rand.Text()) + "@" + host + ">"},
		{"Auto-Submitted", "auto-generated"}, {"MIME-Version", "1.0"},
		{"Content-Type", "text/plain; charset=utf-8"}, {"Content-Transfer-Encoding", "quoted-printable"},
	} {
		fmt.Fprintf(&b, "%s: %s\r\n", h[0], h[1])
	}
	b.WriteString("\r\n")
	q := quotedprintable.NewWriter(&b)
	_, err := io.WriteString(q, strings.ReplaceAll(text, "\n", "\r\n"))
	return b.Bytes(), errors.Join(err, q.Close())
}
