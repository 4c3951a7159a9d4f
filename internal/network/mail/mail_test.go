package mail

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/mail"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/network/store"
)

func TestParseAddress(t *testing.T) {
	long := strings.Repeat("a", 64) + "@" + strings.Repeat("b.", 94) + "c"
	for _, good := range []string{"a@b", "ann@example.org", "ann.o'neil+tag@mail.example.org", "x_y-z@1.2.org", long} {
		if got, err := ParseAddress(good); err != nil || got != good {
			t.Errorf("%q: %q, %v", good, got, err)
		}
	}
	for _, bad := range []string{
		"", "a", "@b", "a@", "a@b@c", "a b@c", " a@b", "a@b ", "<a@b>", "Ann <a@b>", "a@b (c)", `"a"@b`, "a@[127.0.0.1]", "a@b.", "a@-b", "a@b-",
		"a@b_c", ".a@b", "a.@b", "a..b@c", "a@b\r\nBcc: c@d", "a\n@b", "a\x00@b", "ü@b.org", "a@ü.org", "a@b,c@d", "a:b@c;", "g:a@b;",
		strings.Repeat("a", 65) + "@b", long + "d", strings.Repeat("a", 10000), "a@" + strings.Repeat("b", 64),
	} {
		got, err := ParseAddress(bad)
		t.Logf("%.60q: expected: %v; got: %v", bad, ErrAddress, err)
		if !errors.Is(err, ErrAddress) {
			t.Errorf("%.60q: %q, %v", bad, got, err)
		}
	}
}

func TestConfig(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return name
	}
	login := file("login", "user\npass word\n", 0o600)
	good := Config{Server: "mail.example.org:587", Security: StartTLS, From: "Network <n@example.org>", Login: login}
	if _, err := NewSender(good); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*Config)
		key    string
	}{
		"no port":         {func(c *Config) { c.Server = "mail" }, "smtp:"},
		"no host":         {func(c *Config) { c.Server = ":25" }, "smtp:"},
		"unknown":         {func(c *Config) { c.Security = "ssl" }, "smtp_security"},
		"plain elsewhere": {func(c *Config) { c.Security, c.Login = None, "" }, "smtp_security"},
		"plain password":  {func(c *Config) { c.Security, c.Server = None, "127.0.0.1:25" }, "smtp_login"},
		"no sender":       {func(c *Config) { c.From = "" }, "smtp_from"},
		"odd sender":      {func(c *Config) { c.From = "a@b\r\nX: y" }, "smtp_from"},
		"missing login":   {func(c *Config) { c.Login += "x" }, "smtp_login"},
		"one line":        {func(c *Config) { c.Login = file("one", "user", 0o600) }, "smtp_login"},
		"three lines":     {func(c *Config) { c.Login = file("three", "user\npass\nmore\n", 0o600) }, "smtp_login"},
		"for everybody":   {func(c *Config) { c.Login = file("open", "user\npass\n", 0o644) }, "smtp_login"},
		"a long login":    {func(c *Config) { c.Login = file("long", "user\n"+strings.Repeat("p", maxLogin), 0o600) }, "smtp_login"},
		"a long ca":       {func(c *Config) { c.CA = file("ca", strings.Repeat("\n", maxCA+1), 0o600) }, "smtp_ca"},
		"no authority":    {func(c *Config) { c.CA = login }, "smtp_ca"},
		"missing ca":      {func(c *Config) { c.CA = dir + "/none" }, "smtp_ca"},
	} {
		bad := good
		c.change(&bad)
		if _, err := NewSender(bad); err == nil || !strings.HasPrefix(err.Error(), c.key) || strings.Contains(err.Error(), "pass") && !strings.Contains(err.Error(), "password") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// server is an SMTP server that does what a test tells it to.
type server struct {
	addr     string
	answers  map[string]string // by verb, instead of the usual one
	starttls bool
	cert     tls.Certificate
	silent   bool
	log      []string
	data     bytes.Buffer
	mu       sync.Mutex // guards log and data
}

func certificate(t *testing.T) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "mail"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func (s *server) start(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { s.serve(c) })
		}
	})
}

func (s *server) note(line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, line)
}

func (s *server) serve(c net.Conn) {
	defer func() { c.Close() }()
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	if s.silent {
		_, _ = io.Copy(io.Discard, c) // until the other side has enough
		return
	}
	fmt.Fprint(c, "220 test\r\n")
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		verb := strings.ToUpper(line[:min(len(line), 4)])
		s.note(strings.TrimSpace(line))
		if a := s.answers[verb]; a != "" {
			fmt.Fprint(c, a+"\r\n")
			continue
		}
		switch verb {
		case "EHLO":
			if _, encrypted := c.(*tls.Conn); s.starttls && !encrypted {
				fmt.Fprint(c, "250-test\r\n250 STARTTLS\r\n")
			} else {
				fmt.Fprint(c, "250-test\r\n250 AUTH PLAIN\r\n")
			}
		case "STAR":
			fmt.Fprint(c, "220 go on\r\n")
			c = tls.Server(c, &tls.Config{Certificates: []tls.Certificate{s.cert}})
			r = bufio.NewReader(c)
		case "AUTH":
			fmt.Fprint(c, "235 ok\r\n")
		case "DATA":
			fmt.Fprint(c, "354 go on\r\n")
			for {
				line, err := r.ReadString('\n')
				if err != nil || line == ".\r\n" {
					break
				}
				s.mu.Lock()
				s.data.WriteString(strings.TrimPrefix(line, "."))
				s.mu.Unlock()
			}
			fmt.Fprint(c, "250 ok\r\n")
		case "QUIT":
			fmt.Fprint(c, "221 bye\r\n")
			return
		default:
			fmt.Fprint(c, "250 ok\r\n")
		}
	}
}

func TestSend(t *testing.T) {
	cert, ca := certificate(t)
	dir := t.TempDir()
	caFile, login := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "login")
	if err := errors.Join(os.WriteFile(caFile, ca, 0o600), os.WriteFile(login, []byte("user\nsecret\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	const to = "ann@example.org"
	for name, c := range map[string]struct {
		server   *server
		security Security
		change   func(*Config)
		final    bool
		says     string
	}{
		"good":            {server: &server{starttls: true}, security: StartTLS},
		"with login":      {server: &server{starttls: true}, security: StartTLS, change: func(c *Config) { c.Login = login }},
		"plain":           {server: &server{}, security: None},
		"no STARTTLS":     {server: &server{}, security: StartTLS, says: "offers no STARTTLS"},
		"strange cert":    {server: &server{starttls: true}, security: StartTLS, change: func(c *Config) { c.CA = "" }, says: "certificate"},
		"login refused":   {server: &server{starttls: true, answers: map[string]string{"AUTH": "535 no"}}, security: StartTLS, change: func(c *Config) { c.Login = login }, says: "login refused"},
		"greylisted":      {server: &server{answers: map[string]string{"RCPT": "451 4.7.1 <ann@example.org> come back"}}, security: None, says: "come back"},
		"unknown user":    {server: &server{answers: map[string]string{"RCPT": "550 5.1.1 <ANN@example.org>: unknown"}}, security: None, final: true, says: "unknown"},
		"sender refused":  {server: &server{answers: map[string]string{"MAIL": "550 not you"}}, security: None, says: "not you"},
		"content refused": {server: &server{answers: map[string]string{"DATA": "554 spam"}}, security: None, final: true, says: "spam"},
		"busy":            {server: &server{answers: map[string]string{"EHLO": "421 busy", "HELO": "421 busy"}}, security: None, says: "busy"},
		"silent":          {server: &server{silent: true}, security: None, says: "closed"},
		"garbage":         {server: &server{answers: map[string]string{"RCPT": "hello"}}, security: None, says: "hello"},
	} {
		t.Run(name, func(t *testing.T) {
			c.server.cert = cert
			c.server.start(t)
			cfg := Config{Server: c.server.addr, Security: c.security, From: "Network <n@example.org>", CA: caFile}
			if c.change != nil {
				c.change(&cfg)
			}
			s, err := NewSender(cfg)
			if err != nil {
				t.Fatal(err)
			}
			if c.server.silent {
				s.patience = 50 * time.Millisecond
			}
			err = s.Send(t.Context(), to, "a subject", "line\n.dot\nünïcode "+strings.Repeat("long ", 50)+"\n")
			if c.says != "" {
				if err == nil || errors.Is(err, ErrRejected) != c.final || !strings.Contains(err.Error(), c.says) || strings.Contains(strings.ToLower(err.Error()), "ann@") {
					t.Errorf("%v, want %q", err, c.says)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			c.server.mu.Lock()
			defer c.server.mu.Unlock()
			m, err := mail.ReadMessage(&c.server.data)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(m.Body)
			if h := m.Header; err != nil || h.Get("To") != "<"+to+">" || h.Get("From") != `"Network" <n@example.org>` || h.Get("Subject") != "a subject" ||
				h.Get("Auto-Submitted") != "auto-generated" || h.Get("Message-Id") == "" || !bytes.Contains(body, []byte("\r\n.dot\r\n")) {
				t.Errorf("%v\n%s", h, body)
			}
			if log := strings.Join(c.server.log, "\n"); c.security == StartTLS && strings.Index(log, "MAIL") < strings.Index(log, "STARTTLS") || (cfg.Login != "") != strings.Contains(log, "AUTH PLAIN") {
				t.Errorf("%s", log)
			}
		})
	}
	s, err := NewSender(Config{Server: "127.0.0.1:1", Security: None, From: "n@example.org"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(t.Context(), to, "s", "t"); err == nil || errors.Is(err, ErrRejected) {
		t.Errorf("a server that is down: %v", err)
	}
	if err := s.Send(t.Context(), "a@b\r\nBcc: c@d", "s", "t"); !errors.Is(err, ErrRejected) {
		t.Errorf("an address of two lines: %v", err)
	}
	if err := s.Send(t.Context(), to, "s\r\nBcc: c@d", "t"); err == nil || errors.Is(err, ErrRejected) {
		t.Errorf("a subject of two lines: %v", err)
	}
}

// kept is a store in memory.
type kept struct {
	mu    sync.Mutex
	mails map[string]store.Mail
	fail  error
}

func (k *kept) PutMail(_ context.Context, m store.Mail) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail == nil {
		k.mails[m.ID] = m
	}
	return k.fail
}

func (k *kept) Mails(context.Context) (map[string]store.Mail, error) { return k.mails, nil }

func (k *kept) DeleteMail(ctx context.Context, id string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.mails, id)
	return nil
}

func TestOutbox(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &kept{mails: map[string]store.Mail{}}
		begin := time.Now()
		var mu sync.Mutex
		var sent []string
		outcomes := map[string]int{}
		answer := map[string]error{}
		send := func(_ context.Context, m store.Mail) error {
			mu.Lock()
			defer mu.Unlock()
			sent = append(sent, fmt.Sprintf("%s %d", m.ID, int(time.Since(begin).Minutes())))
			return answer[m.ID]
		}
		open := func() (o *Outbox, stop func()) {
			o, err := NewOutbox(t.Context(), k, send, func(s string) { mu.Lock(); outcomes[s]++; mu.Unlock() }, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- o.Run(ctx) }()
			return o, func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
		}
		count := func(outcome string) int {
			mu.Lock()
			defer mu.Unlock()
			return outcomes[outcome]
		}
		waiting := func() int {
			k.mu.Lock()
			defer k.mu.Unlock()
			return len(k.mails)
		}
		put := func(o *Outbox, id string) {
			t.Helper()
			if err := o.Put(t.Context(), store.Mail{ID: id, Expires: time.Now().Add(10 * time.Minute).UnixMilli()}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		mu.Lock()
		answer["late"], answer["never"], answer["no"] = errors.New("later"), errors.New("later"), ErrRejected
		mu.Unlock()
		o, stop := open()
		for _, id := range []string{"now", "no", "late", "never"} {
			put(o, id)
		}
		if count("sent") != 1 || count("rejected") != 1 || count("failed") != 2 || waiting() != 2 {
			t.Errorf("%d sent, %d are kept", count("sent"), waiting())
		}
		time.Sleep(5 * time.Minute)
		stop()
		if n := count("failed"); n < 10 || n > 40 {
			t.Errorf("%d tries in five minutes", n)
		}
		mu.Lock()
		answer["late"] = nil
		mu.Unlock()
		o, stop = open()
		synctest.Wait()
		if count("sent") != 2 || waiting() != 1 {
			t.Errorf("after a restart: %d sent, %d are kept", count("sent"), waiting())
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if count("expired") != 1 || waiting() != 0 {
			t.Errorf("at the end: %d expired, %d are kept", count("expired"), waiting())
		}
		k.mu.Lock()
		k.fail = errors.New("disk full")
		k.mu.Unlock()
		if err := o.Put(t.Context(), store.Mail{ID: "x"}); err == nil {
			t.Error("taken without being written down")
		}
		k.mu.Lock()
		k.fail = nil
		k.mu.Unlock()
		stop()
		for i := range maxWaiting + 1 {
			err := o.Put(t.Context(), store.Mail{ID: fmt.Sprint(i)})
			if full := errors.Is(err, ErrFull); full != (i == maxWaiting) {
				t.Fatalf("message %d: %v", i, err)
			}
		}
	})
}

// A server that takes its time holds up no more than its own share.
// A message that the server has taken while the service ends is not sent again.
func TestSentAtTheEnd(t *testing.T) {
	k := &kept{mails: map[string]store.Mail{}}
	ctx, cancel := context.WithCancel(t.Context())
	send := func(context.Context, store.Mail) error {
		cancel()
		return nil
	}
	o, err := NewOutbox(ctx, k, send, func(string) {}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Put(ctx, store.Mail{ID: "x", Expires: time.Now().Add(time.Hour).UnixMilli()}); err != nil {
		t.Fatal(err)
	}
	if err := o.Run(ctx); err != nil {
		t.Error(err)
	}
	if len(k.mails) != 0 {
		t.Errorf("%d are kept", len(k.mails))
	}
}

func TestOutboxIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		busy, most := 0, 0
		send := func(context.Context, store.Mail) error {
			mu.Lock()
			busy++
			most = max(most, busy)
			mu.Unlock()
			time.Sleep(time.Minute)
			mu.Lock()
			busy--
			mu.Unlock()
			return nil
		}
		o, err := NewOutbox(t.Context(), &kept{mails: map[string]store.Mail{}}, send, func(string) {}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- o.Run(ctx) }()
		for i := range 20 {
			if err := o.Put(ctx, store.Mail{ID: fmt.Sprint(i), Expires: time.Now().Add(time.Hour).UnixMilli()}); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(10 * time.Minute)
		cancel()
		err = <-done
		t.Logf("20 mails: expected: %d at once; got: %d", senders, most)
		if err != nil || most != senders {
			t.Errorf("%d at once, want %d; %v", most, senders, err)
		}
	})
}

// An address is left out of what is logged, also where the text is cut.
func TestToldIsCutBehindAddresses(t *testing.T) {
	for n := 250; n <= 300; n++ {
		text := told(errors.New(strings.Repeat("x", n) + " <ann.of.somewhere@example.org> is unknown")).Error()
		if strings.Contains(text, "ann") || len(text) > 300 {
			t.Fatalf("after %d bytes: %s", n, text)
		}
	}
}

// What is an address has one spelling and nothing in it that ends a line, a
// command of SMTP or a header.
func FuzzParseAddress(f *testing.F) {
	for _, s := range []string{"a@b", "a.b+c@example.org", "A <a@b>", "\"a b\"@c", "a@b\r\nBcc: c@d", "a@[127.0.0.1]", "ä@b", "a@b (c)", "@", "a@b,c@d"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseAddress(s)
		if err != nil {
			if !errors.Is(err, ErrAddress) || got != "" {
				t.Fatalf("%q, %v", got, err)
			}
			return
		}
		if got != s || len(s) > 254 || strings.Count(s, "@") != 1 || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune("<>()[],;:\\\"", r) }) {
			t.Fatalf("%q is taken for %q", s, got)
		}
	})
}
